"""Amounts of memory and time, read and written."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memfit.units import format_bytes, format_seconds, parse_memory


@pytest.mark.parametrize(
    ("text", "expected_bytes"),
    [
        ("8GiB", 8 * 2**30),
        ("512MiB", 512 * 2**20),
        ("64KiB", 65_536),
        ("8192 MiB", 8 * 2**30),
        (" 1.5GiB ", 3 * 2**29),
        ("8TiB", 8 * 2**40),
        ("8GB", 8_000_000_000),
        ("400MB", 400_000_000),
        ("400mb", 400_000_000),
        ("12gib", 12 * 2**30),
        ("123B", 123),
        ("0.1KB", 100),
        (".5GiB", 2**29),
        (8_589_934_592, 2**33),
        (1, 1),
    ],
)
def test_reads_what_people_write(text: str | int, expected_bytes: int) -> None:
    assert parse_memory(text) == expected_bytes


def test_a_share_is_taken_of_the_total_and_rounded_down() -> None:
    assert parse_memory("80%", total_bytes=1_000) == 800
    assert parse_memory("33.3 %", total_bytes=100) == 33
    assert parse_memory("100%", total_bytes=7) == 7


def test_a_share_of_a_huge_total_is_exact() -> None:
    assert parse_memory("50%", total_bytes=2**60 + 2) == 2**59 + 1


def test_a_fraction_of_a_byte_is_dropped() -> None:
    assert parse_memory("1.9B") == 1
    assert parse_memory("0.3KB") == 300  # 0.3 is no binary fraction: floats would drop to 299


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("12Gb", "'12Gb' is in bits: write '12GiB' or '12GB'"),
        ("12Gib", "'12Gib' is in bits: write '12GiB' or '12GB'"),
        ("8 G", "'8 G' can mean two sizes: write '8GiB' or '8GB'"),
        ("512m", "'512m' can mean two sizes: write '512MiB' or '512MB'"),
        ("8", "'8' has no unit: write '8GiB', '8MiB', or '8B' for bytes"),
        ("0", "'0' has no unit"),
        ("", "cannot read '' as an amount of memory: write an int of bytes"),
        ("nan", "cannot read 'nan'"),
        ("-4GiB", "cannot read '-4GiB'"),
        ("1,5GiB", "cannot read '1,5GiB'"),
        ("1e9B", "cannot read '1e9B'"),
        ("٣GiB", "cannot read"),
        ("0GiB", "at least one byte, and '0GiB' is not"),
        ("0.2B", "at least one byte, and '0.2B' is not"),
        ("8XiB", "'8XiB' has the unknown unit 'XiB': write an int of bytes"),
        ("80%", "'80%' is a share of an unknown total: write an int of bytes"),
        (0, "at least one byte, and 0 is not"),
        (-1, "at least one byte, and -1 is not"),
    ],
)
def test_a_refusal_says_what_was_read_and_what_to_write(text: str | int, words: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_memory(text)
    assert words in str(caught.value)


def test_a_share_above_all_of_it_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'120%' is more than all of the 1\.0 KiB: write at most '100%'"):
        parse_memory("120%", total_bytes=1024)
    with pytest.raises(ValueError, match="at least one byte"):
        parse_memory("0%", total_bytes=1024)


@pytest.mark.parametrize("wrong", [True, False, 1.5, None, b"8GiB", float("nan")])
def test_other_types_are_refused_by_type(wrong: object) -> None:
    with pytest.raises(TypeError, match="a str or an int of bytes"):
        parse_memory(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (2**20 - 1, "1.0 MiB"),
        (2**20, "1.0 MiB"),
        (512 * 2**20, "512.0 MiB"),
        (2**30 - 1, "1.00 GiB"),
        (2**30, "1.00 GiB"),
        (7_977_000_000, "7.43 GiB"),
        (5 * 2**40, "5120.00 GiB"),
        (-3 * 2**20, "-3.0 MiB"),
    ],
)
def test_bytes_are_printed_in_the_unit_people_expect(n_bytes: int, text: str) -> None:
    assert format_bytes(n_bytes) == text


@given(st.integers(min_value=1, max_value=2**50))
def test_what_is_printed_reads_back_as_nearly_the_same(n_bytes: int) -> None:
    text = format_bytes(n_bytes)
    half_digit_bytes = {"GiB": 0.005 * 2**30, "MiB": 0.05 * 2**20, "KiB": 0.05 * 2**10, "B": 0}[
        text.split()[1]
    ]
    assert abs(parse_memory(text) - n_bytes) <= half_digit_bytes + 1
    assert not text.startswith(("1024.0 ", "1024 "))  # or the next unit should have been used


@given(st.integers(min_value=1, max_value=2**23 - 1), st.sampled_from(["KiB", "MiB", "GiB", "TiB"]))
def test_a_whole_number_of_a_unit_reads_back_exactly(count: int, unit: str) -> None:
    scale_bytes = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}[unit]
    assert parse_memory(f"{count} {unit}") == count * scale_bytes


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0 s"),
        (2.5e-9, "2.50 ns"),
        (8.31e-2, "83.1 ms"),
        (1.25, "1.25 s"),
        (0.99999, "1.00 s"),
        (9.999, "10.0 s"),
        (59.96, "1min 00s"),
        (67.0, "1min 07s"),
        (3599.9, "1h 00min"),
        (7500.0, "2h 05min"),
        (-0.25, "-250 ms"),
        (float("inf"), "inf s"),
        (float("nan"), "nan s"),
    ],
)
def test_seconds_are_printed_with_three_digits(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
