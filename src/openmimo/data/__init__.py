"""Training data: sources, mixture, packing and the resumable loader."""

from openmimo.data.build import build_loader
from openmimo.data.documents import Document
from openmimo.data.loader import BatchLoader
from openmimo.data.mixture import Mixture
from openmimo.data.packing import Batch, Packer
from openmimo.data.sources import Source, TaskSource, TextSource

__all__ = [
    "Batch",
    "BatchLoader",
    "Document",
    "Mixture",
    "Packer",
    "Source",
    "TaskSource",
    "TextSource",
    "build_loader",
]
