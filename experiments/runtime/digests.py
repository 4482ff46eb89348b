"""SHA-256 digests, which tell a resumed run that its files are as they were written."""

import hashlib
from pathlib import Path

_SEAL = b"# sha256 %s of the lines above\n"


def file_digest(path: Path) -> str:
    """The digest of a file's bytes, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sealed(text: str) -> str:
    """`text` with a last line that holds the digest of its UTF-8 bytes.

    The text must end with a newline.
    """
    return (text.encode() + _seal(text.encode())).decode()


def unsealed(path: Path) -> bytes:
    """The content of a sealed file without its last line.

    Raises ValueError if that line is missing or wrong, OSError if there is no file.
    """
    content = path.read_bytes()
    body, mark, _ = content.rpartition(_SEAL.partition(b"%")[0])
    if not mark:
        raise ValueError(f"{path.name} has no digest in its last line")
    if body + _seal(body) != content:
        raise ValueError(f"{path.name} differs from the digest in its last line")
    return body


def _seal(body: bytes) -> bytes:
    return _SEAL % hashlib.sha256(body).hexdigest().encode()
