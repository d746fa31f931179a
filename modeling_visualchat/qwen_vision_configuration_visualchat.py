# A checkpoint holds the real file under this name; in the installed packages this bridge leads to it.
from configuration_visualchat.qwen_vision_configuration_visualchat import VisualChatQwenVisionConfig  # noqa: F401
