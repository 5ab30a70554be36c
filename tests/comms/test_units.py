"""Quantities: parse and format are inverse, and every mistake says what to write."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comms.errors import UnitError
from comms.units import EXAMPLES, UNITS, Quantity, format_quantity, parse, pattern

quantities = st.sampled_from(list(Quantity))


@pytest.mark.parametrize(
    ("text", "quantity", "value"),
    [
        ("25 GB/s", Quantity.DATA_RATE, 25e9),
        ("200 Gb/s", Quantity.DATA_RATE, 25e9),
        ("1.3 us", Quantity.TIME, 1.3e-6),
        ("80 GiB", Quantity.SIZE, 80 * 2**30),
        ("80GB", Quantity.SIZE, 80e9),
        ("400 W", Quantity.POWER, 400.0),
        ("2.5 USD/h", Quantity.HOURLY_PRICE, 2.5),
        ("312 TFLOP/s", Quantity.COMPUTE_RATE, 312e12),
        ("624 TOP/s", Quantity.COMPUTE_RATE, 624e12),
        ("1.41 GHz", Quantity.FREQUENCY, 1.41e9),
        ("1e3 USD", Quantity.PRICE, 1000.0),
    ],
)
def test_a_quantity_is_its_number_in_base_units(text, quantity, value):
    assert parse(text, quantity) == value


@given(quantities, st.floats(1e-8, 1e17))
def test_parse_undoes_format(quantity, value):
    assert parse(format_quantity(value, quantity, digits=17), quantity) == pytest.approx(value, rel=1e-14)


@given(st.data(), quantities, st.floats(0, 1e12))
def test_every_unit_scales_its_number(data, quantity, number):
    unit = data.draw(st.sampled_from(list(UNITS[quantity])))
    assert parse(f"{number!r} {unit}", quantity) == pytest.approx(
        number * float(UNITS[quantity][unit]), rel=1e-14
    )


@given(st.data(), quantities, st.floats(0, 1e12))
def test_the_pattern_for_editors_accepts_what_parse_accepts(data, quantity, number):
    unit = data.draw(st.sampled_from(list(UNITS[quantity])))
    assert re.search(pattern(quantity), f"{number!r} {unit}")
    assert not re.search(pattern(quantity), f"{number!r}")


@given(st.data(), quantities, quantities)
def test_a_unit_of_another_quantity_is_named(data, expected, other):
    unit = data.draw(st.sampled_from(list(UNITS[other])))
    if unit in UNITS[expected]:
        return
    with pytest.raises(UnitError) as error:
        parse(f"3 {unit}", expected)
    assert f"is a {other}" in error.value.problem
    assert f"a {expected} is expected" in error.value.problem
    assert EXAMPLES[expected] in error.value.hint


@pytest.mark.parametrize("bare", [25, 2.5, True, None, "25", " 2.5 ", ["25 GB/s"]])
def test_a_bare_number_is_refused(bare):
    with pytest.raises(UnitError, match="needs a unit"):
        parse(bare, Quantity.DATA_RATE)


@pytest.mark.parametrize(
    "text",
    [
        "-1 GB/s",
        "1e999 GB/s",
        "nan GB/s",
        "GB/s",
        "",
        "1 2 GB/s",
        "0x10 GB/s",
        *(f"1e{'9' * n} GB/s" for n in (18, 19)),
    ],
)
def test_what_is_not_a_finite_amount_is_refused(text):
    with pytest.raises(UnitError):
        parse(text, Quantity.DATA_RATE)


def test_an_unknown_unit_names_the_nearest():
    with pytest.raises(UnitError, match="did you mean 'GB/s'"):
        parse("25 GBs", Quantity.DATA_RATE)
    with pytest.raises(UnitError, match="one of USD/h"):
        parse("25 quux", Quantity.HOURLY_PRICE)


@pytest.mark.parametrize(
    ("value", "quantity", "text"),
    [
        (2.316e11, Quantity.DATA_RATE, "231.6 GB/s"),
        (1.3e-6, Quantity.TIME, "1.3 us"),
        (0.0, Quantity.TIME, "0 s"),
        (999.96e9, Quantity.SIZE, "1 TB"),
        (0.5, Quantity.HOURLY_PRICE, "0.5 USD/h"),
        (28672.0, Quantity.HOURLY_PRICE, "28670 USD/h"),
    ],
)
def test_format_picks_the_readable_unit(value, quantity, text):
    assert format_quantity(value, quantity) == text
