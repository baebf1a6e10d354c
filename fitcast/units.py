"""Bytes and names as text: the only place that knows 2**10, 2**20 and 2**30.

Vendors sell memory in GB (10**9 bytes); PyTorch and `nvidia-smi` count in GiB and MiB (2**30 and
2**20). The T4's "16 GB" is 14.56 GiB that a program can see. Everything here is GiB.
"""

KIB = 2**10
MIB = 2**20
GIB = 2**30
GB = 10**9  # vendors' unit, for quoting them only
IGNORED = -100  # the label of a token without a target: torch's cross entropy skips it


def show_bytes(n_bytes: int | None, unit: str = "auto") -> str:
    """Bytes as text in B, KiB, MiB or GiB; `None` is a quantity that nobody measured.

    Args:
        n_bytes: A count of bytes, or `None`.
        unit: "B", "KiB", "MiB", "GiB", or "auto" for the largest that keeps the number above 1.

    Raises:
        ValueError: The unit has another name.

    Example:
        >>> show_bytes(536870912)
        '512.00 MiB'
        >>> show_bytes(14912 * MIB)
        '14.56 GiB'
        >>> show_bytes(None)
        'not measured on cpu'
    """
    sizes = {"B": 1, "KiB": KIB, "MiB": MIB, "GiB": GIB}
    if n_bytes is None:
        return "not measured on cpu"
    if unit == "auto":
        unit = next((u for u in ("GiB", "MiB", "KiB") if abs(n_bytes) >= sizes[u]), "B")
    if unit not in sizes:
        raise ValueError(f"unit must be one of {', '.join(sizes)} or auto, got {unit!r}; pick one")
    return f"{n_bytes:,} B" if unit == "B" else f"{n_bytes / sizes[unit]:,.2f} {unit}"


def with_article(name: str) -> str:
    """The name of a GPU after "a" or "an", as it is read aloud.

    Example:
        >>> with_article("T4"), with_article("A10"), with_article("NVIDIA H200")
        ('a T4', 'an A10', 'an NVIDIA H200')
    """
    return f"{'an' if name[0] in 'AEFHILMNORSX8' else 'a'} {name}"


def round_up(n: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `n`.

    Example:
        >>> round_up(1, 512), round_up(1024, 512)
        (512, 1024)
    """
    return -(-n // multiple) * multiple


def refusal(field: str, rule: str, got: object, remedy: str) -> ValueError:
    """The error for a bad value: which field, what it must be, what it was, what to change.

    Args:
        field: The name under which the caller gave the value.
        rule: What comes after "must", as in "be a whole number from 1 to 4096".
        got: The value; text that is quoted already, as a sentence part, goes in as `Said`.
        remedy: What to change.

    Example:
        >>> print(refusal("seed", "be a whole number", "x", "for example seed=8"))
        seed must be a whole number, got 'x'; for example seed=8
    """
    shown = str(got) if isinstance(got, Said) else repr(got)
    return ValueError(f"{field} must {rule}, got {shown}; {remedy}")


class Said(str):
    """Words that an error shows as they are, without quotes."""
