"""VisualChat: vision-language chat over many rounds and images, a plugin for Hugging Face transformers."""

import re
from pathlib import Path

from setuptools import setup


ROOT = Path(__file__).parent
CONFIGURATION = ROOT / "configuration_visualchat" / "configuration_visualchat.py"

# Pillow draws the chats of the main job with matplotlib; scikit-learn carries its scans.
EXAMPLES = ["matplotlib>=3.9,<4", "scikit-learn>=1.5,<2", "pyyaml>=6,<7"]
GGUF = ["gguf>=0.19,<0.20"]
TESTS = ["pytest>=8,<10", "ruff>=0.14,<1", "mypy>=1.18,<3", "types-PyYAML>=6"]

setup(
    name="visualchat",
    version=re.search(r'^VERSION = "(.+)"$', CONFIGURATION.read_text(), re.MULTILINE).group(1),
    description=__doc__.strip(),
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=["configuration_visualchat", "modeling_visualchat", "processing_visualchat"],
    package_data={"modeling_visualchat": ["hub_card.md"]},
    install_requires=[
        "torch>=2.13,<2.14",
        "transformers>=5.23,<5.24",
        "accelerate>=1.15,<2",
        "deepspeed>=0.19.8,<0.20",
        "datasets>=4,<6",
        "safetensors>=0.6,<1",
        "peft>=0.21,<0.22",
        "pillow>=11.3,<13",
    ],
    extras_require={"examples": EXAMPLES, "gguf": GGUF, "tests": EXAMPLES + GGUF + TESTS},
)
