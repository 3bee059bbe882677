"""Floor 2: sealed files, which hide names, shapes and bytes, and say who sealed them.

    >>> from isolate import sealed
    >>> sealed.Epoch(3)
    Epoch(least=3, generation=0)

``save_file``, ``load_file`` and ``safe_open`` are safetensors' own, plus who may read (``recipients=``,
``identity=``) and who must have written (``signed_by=`` or ``expect=``, one of which is required).
docs/spec/sealed-file.md is the format.
"""

from isolate.sealed.directory import Epoch, PublicFacts
from isolate.sealed.folder import SealedFolder, open_folder, seal_folder, unseal_folder
from isolate.sealed.keys import CompartmentKeys, FileKey
from isolate.sealed.reader import SealedReader, check_origin, public_facts
from isolate.sealed.recipients import KeyWrapper, Passphrase, Unlocker, compartment_keys, open_file_key
from isolate.sealed.rewrap import rewrap
from isolate.sealed.safetensors import load_file, safe_open, save_file, seal_file, unseal_file
from isolate.sealed.writer import SealedWriter

__all__ = [
    "CompartmentKeys",
    "Epoch",
    "FileKey",
    "KeyWrapper",
    "Passphrase",
    "PublicFacts",
    "SealedFolder",
    "SealedReader",
    "SealedWriter",
    "Unlocker",
    "check_origin",
    "compartment_keys",
    "load_file",
    "open_file_key",
    "open_folder",
    "public_facts",
    "rewrap",
    "safe_open",
    "save_file",
    "seal_file",
    "seal_folder",
    "unseal_file",
    "unseal_folder",
]
