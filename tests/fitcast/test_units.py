import pytest

from fitcast.units import GIB, MIB, show_bytes


def test_vendor_and_program_units_differ():
    assert show_bytes(16 * 10**9, "GiB") == "14.90 GiB"


def test_not_measured_is_said_and_zero_is_zero():
    assert show_bytes(None) == "not measured on cpu"
    assert show_bytes(0) == "0 B"


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [
        (1023, "1,023 B"),
        (1024, "1.00 KiB"),
        (MIB, "1.00 MiB"),
        (GIB - 1, "1,024.00 MiB"),
        (-3 * GIB, "-3.00 GiB"),
    ],
)
def test_auto_takes_the_largest_unit_above_one(n_bytes, text):
    assert show_bytes(n_bytes) == text


def test_unknown_unit():
    with pytest.raises(ValueError, match="unit must be one of B, KiB, MiB, GiB or auto, got 'GB'"):
        show_bytes(1, "GB")
