"""The wrapped Hugging Face model: `load` or `wrap` one, name its sites, batch its inputs."""

from stratoscope.models.batch import Batch
from stratoscope.models.lm import LM
from stratoscope.models.load import load, wrap
from stratoscope.models.sites import Site

__all__ = ["LM", "Batch", "Site", "load", "wrap"]
