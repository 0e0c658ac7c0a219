"""Files of torch.save, read without torch.

Files, in the order in which to read them:

    reader.py   both formats of torch.save, as an object tree with a View for each tensor
    archive.py  which bytes of a zip file belong to which entry
    opcodes.py  the few pickle opcodes that describe plain tensors, and no others
"""

from npllama.checkpoints.pytorch.opcodes import Opaque
from npllama.checkpoints.pytorch.reader import read_legacy, read_zip

__all__ = ["Opaque", "read_legacy", "read_zip"]
