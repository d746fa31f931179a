"""VisualChat: vision-language chat over many rounds and images, a plugin for Hugging Face transformers."""

import re
from pathlib import Path

from setuptools import setup


ROOT = Path(__file__).parent
CONFIGURATION = ROOT / "configuration_visualchat" / "configuration_visualchat.py"

# scikit-learn carries the scans of the main job, matplotlib draws its chats, prompt_toolkit reads the lines of a chat.
EXAMPLES = ["matplotlib>=3.11,<4", "scikit-learn>=1.9,<2", "pyyaml>=6,<7", "prompt_toolkit>=3.0.53,<4"]
EVALUATION = ["openai>=3.57,<4", "pycocoevalcap>=1.2,<2", "rouge-score>=0.1.2,<0.2"]
SERVING = ["fastapi>=0.165,<0.166", "uvicorn>=0.54,<0.55", "prometheus_client>=0.26,<0.27"]
RAY = ["ray[serve]>=2.60,<2.61"]
WEB = ["gradio>=6.31,<7"]
GGUF = ["gguf>=0.19,<0.20"]
TESTS = ["pytest>=9,<10", "pytest-xdist>=3.8,<4", "hypothesis>=6.170,<7", "onnx>=1.23,<2", "onnxruntime>=1.32,<2"]
TESTS += ["bitsandbytes>=0.50,<0.51", "torchao>=0.18,<0.19", "pexpect>=4.9,<5"]
TESTS += ["playwright>=1.65,<2"]  # it drives the Chromium of the system, where there is one
TESTS += ["ruff>=0.17.6,<0.18", "mypy>=2.4,<3"]

setup(
    name="visualchat",
    version=re.search(r'^VERSION = "(.+)"$', CONFIGURATION.read_text(), re.MULTILINE).group(1),
    description=__doc__.strip(),
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[
        "configuration_visualchat",
        "modeling_visualchat",
        "processing_visualchat",
        "processing_visualchat.data",
        "processing_visualchat.data.published",
        "processing_visualchat.doctor",
        "processing_visualchat.evaluation",
        "processing_visualchat.evaluation.suites",
    ],
    package_data={"modeling_visualchat": ["hub_card.md"]},
    install_requires=[
        "torch>=2.13,<2.14",
        "transformers>=5.23,<5.24",
        "accelerate>=1.15,<2",
        "deepspeed>=0.19.8,<0.20",
        "datasets>=5.2,<6",
        "safetensors>=0.8,<1",
        "peft>=0.21.2,<0.22",
        "pillow>=11.3,<14",
        "networkx>=3.6,<4",
        "pymetis>=2025.2,<2026",
    ],
    entry_points={"lmms_eval.models": ["visualchat = processing_visualchat.evaluation.lmms_eval_model:MANIFEST"]},
    extras_require={
        "examples": EXAMPLES,
        "evaluation": EVALUATION,
        "serving": SERVING,
        "replicas": SERVING + RAY,
        "gguf": GGUF,
        "web": WEB,
        "tests": EXAMPLES + EVALUATION + SERVING + RAY + GGUF + WEB + TESTS,
    },
)
