"""The split of conversations into training and evaluation by image."""

import random
from collections.abc import Sequence


def split_by_image(images: Sequence[Sequence[str]], share: float, seed: int) -> list[bool]:
    """
    Which conversations are for evaluation, so that no image is on both sides.

    Conversations that share an image, directly or through others, stay together. A group of them goes to evaluation as
    long as that does not take evaluation beyond its share of the images.

    Args:
        images (`Sequence` of `Sequence` of `str`): The images of each conversation; one without any is a group alone.
        share (`float`): Of the images, or of the conversations without one.
        seed (`int`): Of the choice.
    """
    parents: dict[str, str] = {}

    def find(image: str) -> str:
        while parents.setdefault(image, image) != image:
            parents[image] = parents[parents[image]]
            image = parents[image]
        return image

    for row in images:
        for image in row[1:]:
            parents[find(image)] = find(row[0])
    members: dict[str, list[int]] = {}
    for index, row in enumerate(images):
        members.setdefault(find(row[0]) if row else f"conversation {index}", []).append(index)
    roots = list(members)
    random.Random(seed).shuffle(roots)
    sizes = {root: len({image for index in members[root] for image in images[index]}) or 1 for root in roots}
    left = share * sum(sizes.values())
    is_eval = [False] * len(images)
    for root in roots:
        if sizes[root] <= left:
            left -= sizes[root]
            for index in members[root]:
                is_eval[index] = True
    return is_eval
