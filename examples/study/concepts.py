"""What the pictures of the pretrained study show: concepts by kind, each with its emoji and its name in answers."""

_ANIMALS = """
🐒 monkey, 🦍 gorilla, 🐕 dog, 🐺 wolf, 🦊 fox, 🦝 raccoon, 🐈 cat, 🦁 lion, 🐅 tiger, 🐆 leopard,
🐎 horse, 🦓 zebra, 🦌 deer, 🐄 cow, 🐂 bull, 🐖 pig, 🐗 wild boar, 🐏 ram, 🐑 sheep, 🐐 goat, 🐪 camel,
🦙 llama, 🦒 giraffe, 🐘 elephant, 🦏 rhino, 🦛 hippopotamus, 🐁 mouse, 🐀 rat, 🐹 hamster, 🐇 rabbit,
🐿 squirrel, 🦔 hedgehog, 🦇 bat, 🐻 bear, 🐨 koala, 🐼 panda, 🦥 sloth, 🦦 otter, 🦨 skunk, 🦘 kangaroo,
🦡 badger, 🦃 turkey, 🐔 chicken, 🐓 rooster, 🐤 chick, 🐧 penguin, 🕊 dove, 🦅 eagle, 🦆 duck, 🦢 swan,
🦉 owl, 🦩 flamingo, 🦚 peacock, 🦜 parrot, 🐸 frog, 🐊 crocodile, 🐢 turtle, 🦎 lizard, 🐍 snake,
🐉 dragon, 🐋 whale, 🐬 dolphin, 🐟 fish, 🦈 shark, 🐙 octopus, 🦀 crab, 🦞 lobster, 🦐 shrimp, 🦑 squid,
🐌 snail, 🦋 butterfly, 🐜 ant, 🐝 bee, 🐞 ladybug, 🦗 cricket, 🕷 spider, 🦂 scorpion, 🦟 mosquito
"""
_FOOD = """
🍇 grapes, 🍈 melon, 🍉 watermelon, 🍊 orange, 🍋 lemon, 🍌 banana, 🍍 pineapple, 🥭 mango, 🍎 apple,
🍐 pear, 🍑 peach, 🍒 cherries, 🍓 strawberry, 🥝 kiwi, 🍅 tomato, 🥥 coconut, 🥑 avocado, 🍆 eggplant,
🥔 potato, 🥕 carrot, 🌽 corn, 🌶 pepper, 🥒 cucumber, 🥬 lettuce, 🥦 broccoli, 🧄 garlic, 🧅 onion,
🍄 mushroom, 🥜 peanuts, 🌰 chestnut, 🍞 bread, 🥐 croissant, 🥖 baguette, 🥨 pretzel, 🥯 bagel,
🥞 pancakes, 🧇 waffle, 🧀 cheese, 🍗 chicken leg, 🥩 steak, 🥓 bacon, 🍔 hamburger, 🍟 fries, 🍕 pizza,
🌭 hot dog, 🥪 sandwich, 🌮 taco, 🌯 burrito, 🍳 fried egg, 🥗 salad, 🍿 popcorn, 🍣 sushi, 🍝 spaghetti,
🍦 ice cream, 🍩 doughnut, 🍪 cookie, 🎂 cake, 🧁 cupcake, 🥧 pie, 🍫 chocolate, 🍬 candy, 🍭 lollipop,
🍯 honey
"""
_VEHICLES = """
🚂 locomotive, 🚄 train, 🚋 tram, 🚌 bus, 🚑 ambulance, 🚒 fire truck, 🚓 police car, 🚕 taxi, 🚗 car,
🚚 truck, 🚜 tractor, 🏎 race car, 🏍 motorcycle, 🛵 scooter, 🚲 bicycle, ⛵ sailboat, 🛶 canoe,
🚤 speedboat, 🚢 ship, ✈ airplane, 🚁 helicopter, 🚀 rocket, 🛸 flying saucer, 🛹 skateboard
"""
_GARMENTS = """
👔 tie, 👕 shirt, 👖 trousers, 🧣 scarf, 🧤 glove, 🧥 coat, 🧦 sock, 👗 dress, 👘 kimono, 🩱 swimsuit,
🩳 shorts, 👙 bikini, 👜 bag, 🎒 backpack, 🩴 sandal, 👟 sneaker, 👢 boot, 👠 high heel, 👒 hat,
🎩 top hat, 🧢 cap, ⛑ helmet, 👑 crown
"""


def _read(table: str) -> dict[str, str]:
    """Names and their emoji, from `emoji name` separated by commas."""
    pairs = (entry.split(maxsplit=1) for entry in table.replace("\n", " ").split(","))
    return {name.strip(): emoji for emoji, name in pairs}


CONCEPTS: dict[str, dict[str, str]] = {
    "animal": _read(_ANIMALS),
    "food": _read(_FOOD),
    "vehicle": _read(_VEHICLES),
    "garment": _read(_GARMENTS),
}
# Folders of tuxpaint's stamps, and the classes of Fashion-MNIST by their number.
STAMP_FOLDERS = {"animals": "animal", "food": "food", "vehicles": "vehicle", "clothes": "garment"}
GARMENT_CLASSES = (
    "shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot",
)  # fmt: skip
# Last words of captions that name a concept in another way.
SYNONYMS = {
    "pants": "trousers", "jacket": "coat", "fedora": "hat", "sombrero": "hat", "hen": "chicken", "drake": "duck",
    "gander": "goose", "dromedary": "camel", "doe": "deer", "caribou": "deer", "iguana": "lizard",
    "chimpanzee": "monkey", "lorikeet": "parrot", "rosella": "parrot", "kiwifruit": "kiwi", "lemon slice": "lemon",
}  # fmt: skip
