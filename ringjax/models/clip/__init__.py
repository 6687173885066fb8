"""The vision transformer of CLIP, which shows pictures to a language model.

    config      ClipConfig, checked when it is read
    model       patches to hidden states
    pictures    a picture's size and range, as in preprocessor_config.json
"""

from ringjax.models.clip.config import ClipConfig
from ringjax.models.clip.model import ACTIVATIONS, ClipVision
from ringjax.models.clip.pictures import Preprocessing

__all__ = ["ACTIVATIONS", "ClipConfig", "ClipVision", "Preprocessing"]
