"""Scans of handwritten digits, and the words for them."""

import random

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits


WORDS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen",
)  # fmt: skip


def load_scans(held_out: float = 0.2, seed: int = 0) -> tuple[list, list]:
    """Training scans and held-out scans as `(image, digit)` pairs, with the same share of each digit held out."""
    digits = load_digits()
    scans = [
        (Image.fromarray((pixels * (255 / 16)).round().astype(np.uint8)), int(digit))
        for pixels, digit in zip(digits.images, digits.target)
    ]
    random.Random(seed).shuffle(scans)
    train, test = [], []
    for digit in range(10):
        of_digit = [scan for scan in scans if scan[1] == digit]
        cut = round(len(of_digit) * held_out)
        test += of_digit[:cut]
        train += of_digit[cut:]
    return train, test
