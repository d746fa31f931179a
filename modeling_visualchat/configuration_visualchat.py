# A checkpoint holds the real file under this name; in the installed packages this bridge leads to it.
from configuration_visualchat.configuration_visualchat import (  # noqa: F401
    NUM_PERCEIVER_QUERIES,
    VERSION,
    VisualChatConfig,
)
