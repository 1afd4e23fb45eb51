"""Settings: every range and its message, keys in TOML and on the command line, round trips, and merging."""

import copy
import math
import re
import tomllib
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from lorasmith.config.arguments import parsed
from lorasmith.config.schema import Config
from lorasmith.config.settings import settings
from lorasmith.config.values import configured, merged, toml_of

KNOWN = settings()
PARTS = [key for key in KNOWN if any(other.startswith(f"{key}.") for other in KNOWN)]  # chosen by name
RANGE = re.compile(r"(above )?(-?[0-9.e+-]+)(?:,? up)? to (below )?([0-9.e+-]+)")
quick = hypothesis_settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def nested(key: str, value: Any, name: str | None = None) -> dict[str, Any]:
    """The value under its dotted key, in a part of this name."""
    tables = key.split(".")
    result: dict[str, Any] = {tables[-1]: value}
    if name is not None:
        result["name"] = name
    for table in reversed(tables[:-1]):
        result = {table: result}
    return result


def refusal(values: dict[str, Any]) -> str | None:
    """What is said of these values, if they are not accepted."""
    try:
        configured(values)
    except ValueError as error:
        return str(error)
    return None


def from_tokens(*tokens: str) -> Config:
    others, values = parsed(tokens)
    assert not others
    return configured(values)


def names_of(key: str) -> list[str | None]:
    """The names of the parts that have this setting; [None] for one that is in no part."""
    part, _, field = key.rpartition(".")
    if part not in PARTS:
        return [None]
    names = KNOWN[part].rule.removeprefix("one of ").split(", ")
    return [name for name in names if refusal(nested(key, [], name)) != f"{part} {name} has no setting {field}"]


PLACES = [(key, name) for key in KNOWN for name in names_of(key)]
RANGES = [(key, name) for key, name in PLACES if RANGE.fullmatch(KNOWN[key].rule)]


def ends(key: str, name: str | None) -> tuple[list[float], list[float]]:
    """The least and the greatest value that the rule allows, and their neighbours outside."""
    match = RANGE.fullmatch(KNOWN[key].rule)
    assert match
    above, low, below, high = match[1], float(match[2]), match[3], float(match[4])
    if refusal(nested(key, low + 0.5, name)):  # whole numbers
        assert not above and not below
        least, greatest = int(match[2]), int(match[4])
        return [least, greatest], [least - 1, greatest + 1]
    after, before = math.nextafter(low, math.inf), math.nextafter(high, -math.inf)
    lower, higher = math.nextafter(low, -math.inf), math.nextafter(high, math.inf)
    return [after if above else low, before if below else high], [low if above else lower, high if below else higher]


def test_every_setting_is_there_and_says_what_it_is() -> None:
    assert all(setting.help and setting.rule and setting.default for setting in KNOWN.values())
    # what a kind that the rules do not know would be called:
    assert all(setting.kind is tuple for setting in KNOWN.values() if setting.rule == "a list of texts")
    assert {"model", "data.folder", "steps", "adapter", "adapter.rank", "times.std", "sampling.prompts"} <= set(KNOWN)
    assert set(Config.model_fields) == {key.partition(".")[0] for key in KNOWN}
    assert {"adapter", "optimizer", "schedule", "loss", "times"} <= set(PARTS)
    assert len(RANGES) > 25
    assert ("optimizer.momentum", "SGD") in RANGES and ("optimizer.momentum", "AdamW") not in RANGES


@pytest.mark.parametrize("key", KNOWN)
def test_a_setting_given_its_default_changes_nothing(key: str) -> None:
    part, _, _ = key.rpartition(".")
    chosen = [f"--{part}", str(names_of(key)[0])] if part in PARTS else []
    assert from_tokens(*chosen, f"--{key}", KNOWN[key].default) == from_tokens(*chosen)


@pytest.mark.parametrize(("key", "name"), RANGES)
def test_ranges_hold_to_their_ends(key: str, name: str | None) -> None:
    inside, outside = ends(key, name)
    tokens = [] if name is None else [f"--{key.rpartition('.')[0]}", name]
    for value in inside:
        assert refusal(nested(key, value, name)) is None
        assert from_tokens(*tokens, f"--{key}", repr(value)) == configured(nested(key, value, name))
    for value in [*outside, math.nan, math.inf, -math.inf]:
        assert refusal(nested(key, value, name)) == f"{key} must be {KNOWN[key].rule}, got {value!r}"
        message = re.escape(f"{key} must be {KNOWN[key].rule}, got {repr(value)!r}")
        with pytest.raises(ValueError, match=f"^{message}$"):
            from_tokens(*tokens, f"--{key}", repr(value))


@pytest.mark.parametrize("key", KNOWN)
@pytest.mark.parametrize("value", [{"x": 1}, [[1]], {}])
def test_values_of_another_kind_are_refused_in_one_line(key: str, value: Any) -> None:
    if key not in PARTS:  # whose values are tables
        message = refusal(nested(key, value, names_of(key)[0]))
        assert message and message.startswith(f"{key} must be ") and "\n" not in message


@pytest.mark.parametrize("key", PARTS)
@pytest.mark.parametrize("value", [3, True, [], "nothing", {"name": "nothing"}, {"name": 3}, [{"name": "nothing"}]])
def test_parts_of_unknown_names_are_refused(key: str, value: Any) -> None:
    got = value["name"] if isinstance(value, dict) else value
    assert refusal({key: value}) == f"{key} must be {KNOWN[key].rule}, got {got!r}"


def test_tables_are_tables() -> None:
    assert refusal({"data": "x"}) == "data must be a table of settings, got 'x'"
    assert refusal({"sampling": 3}) == "sampling must be a table of settings, got 3"


def test_patterns_must_be_regular_expressions() -> None:
    message = refusal({"targets": {"include": ["ok", "("]}})
    assert message and re.fullmatch(r"targets\.include must be a regular expression \(.*\), got '\('", message)


def test_devices() -> None:
    for device in ("auto", "cpu", "mps", "cuda", "cuda:0", "cuda:17"):
        assert configured({"device": device}).device == device
    for device in ("", "gpu", "cuda:", "cuda:x", "cpu\n", "CPU"):
        assert refusal({"device": device}) == f"device must be auto, cpu, mps, cuda or cuda:N, got {device!r}"


def test_seeds_have_all_64_bits() -> None:
    assert from_tokens("--seed", str(2**64 - 1)).seed == 2**64 - 1
    assert configured(tomllib.loads(f"seed = {2**64 - 1}")).seed == 2**64 - 1
    for text in (str(2**64), "-1", "1e3", "0x10", ""):
        message = re.escape(f"seed must be 0 to 18446744073709551615, got {text!r}")
        with pytest.raises(ValueError, match=f"^{message}$"):
            from_tokens("--seed", text)


UNKNOWN = [
    ("alpha", "there is no setting alpha: did you mean adapter.alpha?"),
    ("setps", "there is no setting setps: did you mean steps?"),
    ("learning_rat", "there is no setting learning_rat: did you mean learning_rate?"),
    ("data.foldr", "there is no setting data.foldr: did you mean data.folder?"),
    ("data.rank", "there is no setting data.rank: did you mean adapter.rank?"),
    ("adapter.rnk", "there is no setting adapter.rnk: did you mean adapter.rank?"),
    ("optimizer.momentm", "there is no setting optimizer.momentm: did you mean optimizer.momentum?"),
    ("optimizer.SGD", "there is no setting optimizer.SGD: did you mean optimizer?"),
    ("sampling.promt", "there is no setting sampling.promt: did you mean sampling.prompts?"),
    ("times.std", "times uniform has no setting std"),
    ("optimizer.momentum", "optimizer AdamW has no setting momentum"),
    ("loss.delta", "loss MSE has no setting delta"),
    ("xyzzy", "there is no setting xyzzy"),
]


@pytest.mark.parametrize(("key", "message"), UNKNOWN)
def test_unknown_keys_name_the_nearest(key: str, message: str) -> None:
    exactly = f"^{re.escape(message)}$"
    with pytest.raises(ValueError, match=exactly):
        configured(tomllib.loads(f"{key} = 0.5"))
    for tokens in ([f"--{key}", "0.5"], [f"--{key}=0.5"], [f"--{key.replace('_', '-')}", "0.5"]):
        with pytest.raises(ValueError, match=exactly):
            from_tokens(*tokens)


def test_a_table_given_a_value_names_a_setting_in_it() -> None:
    with pytest.raises(ValueError, match=r"^there is no setting sampling: did you mean sampling\.prompts\?$"):
        parsed(["--sampling", "x"])


def test_a_field_of_another_part_is_refused() -> None:
    assert refusal({"optimizer": {"name": "SGD", "beta1": 0.5}}) == "optimizer SGD has no setting beta1"
    with pytest.raises(ValueError, match="^schedule constant has no setting end$"):
        from_tokens("--schedule", "constant", "--schedule.end", "0.5")


def test_parts_are_named_alone_or_with_fields_in_either_order() -> None:
    assert from_tokens("--optimizer", "SGD") == configured({"optimizer": {"name": "SGD"}})
    assert from_tokens("--optimizer", "SGD") == configured({"optimizer": "SGD"})
    assert from_tokens("--schedule", "cosine").schedule.name == "cosine"
    expected = configured({"optimizer": {"name": "SGD", "momentum": 0.9}})
    name, field = ["--optimizer", "SGD"], ["--optimizer.momentum", "0.9"]
    assert from_tokens(*name, *field) == expected
    assert from_tokens(*field, *name) == expected
    assert from_tokens("--optimizer.name", "SGD", *field) == expected  # as a TOML file has it
    assert from_tokens("--adapter.rank", "4").adapter.rank == 4  # of the part that is the default


@pytest.mark.parametrize(
    "arguments",
    [
        "--grad_accumulation_steps 2 --optimizer.weight_decay 0.5",
        "--grad-accumulation-steps 2 --optimizer.weight-decay 0.5",
        "--grad_accumulation_steps=2 --optimizer.weight-decay=0.5",
        "--grad_accumulation_steps=7 --optimizer.weight_decay=5e-1 --grad-accumulation-steps 2",
    ],
)
def test_keys_with_hyphens_and_equals_signs(arguments: str) -> None:
    assert from_tokens(*arguments.split()) == configured(
        {"grad_accumulation_steps": 2, "optimizer": {"weight_decay": 0.5}}
    )


def test_values_may_hold_equals_signs_and_hyphens() -> None:
    assert from_tokens("--model=a=b--c").model == "a=b--c"
    assert from_tokens("--model=--steps").model == "--steps"
    assert from_tokens("--times", "logit_normal", "--times.mean", "-1.5").times.model_dump()["mean"] == -1.5


def test_what_is_no_setting_is_left_over() -> None:
    found = parsed(["cats", "--steps", "3", "-x", "--gradient_checkpointing", "dogs"])
    assert found == (["cats", "-x", "dogs"], {"steps": "3", "gradient_checkpointing": "true"})


@pytest.mark.parametrize("tokens", [["--seed"], ["--seed", "--steps", "3"], ["--steps", "3", "--seed"]])
def test_a_missing_value_is_refused(tokens: list[str]) -> None:
    with pytest.raises(ValueError, match="^--seed needs a value: 0 to 18446744073709551615$"):
        parsed(tokens)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (["--gradient_checkpointing"], True),
        (["--gradient_checkpointing", "true"], True),
        (["--gradient_checkpointing", "false"], False),
        (["--gradient-checkpointing", "False"], False),
        (["--gradient_checkpointing=false"], False),
        (["--gradient_checkpointing=off", "--steps", "3"], False),
    ],
)
def test_booleans(tokens: list[str], expected: bool) -> None:
    assert from_tokens(*tokens).gradient_checkpointing is expected


def test_a_boolean_takes_no_other_value() -> None:
    with pytest.raises(ValueError, match="^gradient_checkpointing must be true or false, got 'maybe'$"):
        from_tokens("--gradient_checkpointing=maybe")


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["cat"], ("cat",)),
        (["cat", "a dog"], ("cat", "a dog")),
        (['["cat", "a dog"]'], ("cat", "a dog")),
        (["[ 'cat',\n'dog' ]", "bird"], ("cat", "dog", "bird")),
        (["[]"], ()),
        (["[]", "cat"], ("cat",)),
        ([""], ("",)),
        (["[bold]cat[/bold]"], ("[bold]cat[/bold]",)),
        (["[ab]c"], ("[ab]c",)),
        (["none"], None),
        (["none", "cat"], ("cat",)),
    ],
)
def test_lists(texts: list[str], expected: tuple[str, ...] | None) -> None:
    assert (
        from_tokens(*(token for text in texts for token in ("--sampling.prompts", text))).sampling.prompts == expected
    )


@pytest.mark.parametrize("text", ['["cat"', "['cat' 'dog']", '["cat"] and'])
def test_broken_lists_are_refused(text: str) -> None:
    with pytest.raises(
        ValueError, match=rf"^sampling\.prompts must be a list of texts, got {re.escape(repr(text))} \("
    ):
        from_tokens("--sampling.prompts", text)


def test_none_takes_a_value_away() -> None:
    values = {"steps": 3, "adapter": {"alpha": 2.0}, "data": {"held_out": "x"}, "output": "y"}
    tokens = ["--steps", "none", "--adapter.alpha", "none", "--data.held_out", "none", "--output", "none"]
    assert configured(merged(values, parsed(tokens)[1])) == configured({})
    with pytest.raises(ValueError, match="^batch_size must be 1 to 10000, got 'none'$"):
        from_tokens("--batch_size", "none")
    assert from_tokens("--base_dtype", "none").base_dtype == "none"  # which is a value of its own


def drawable(key: str, name: str | None) -> st.SearchStrategy[Any]:
    """Values that a setting may have."""
    setting = KNOWN[key]
    if (key, name) in RANGES:
        (least, greatest), _ = ends(key, name)
        if isinstance(least, int):
            return st.integers(least, int(greatest))
        return st.floats(least, greatest)
    if setting.rule.startswith("one of "):
        return st.sampled_from(setting.rule.removeprefix("one of ").split(", "))
    if key == "device":
        return st.sampled_from(["auto", "cuda:3"])
    text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
    if setting.kind is tuple:
        return st.lists(text.map(re.escape), max_size=3)
    return st.booleans() if setting.kind is bool else text


@st.composite
def configs(draw: Callable[[st.SearchStrategy[Any]], Any]) -> Config:
    """Configs in which any setting may be another than its default."""
    names = {part: draw(drawable(part, None)) for part in PARTS}
    chosen = draw(st.sets(st.sampled_from(PLACES)))
    values: dict[str, Any] = dict(names)
    for key, name in sorted(chosen, key=str):
        part, _, _ = key.rpartition(".")
        if key not in PARTS and name in (None, names.get(part)):
            values = merged(values, nested(key, draw(drawable(key, name)), name))
    return configured(values)


@quick
@given(configs())
def test_a_config_comes_back_from_its_toml(config: Config) -> None:
    assert configured(tomllib.loads(toml_of(config))) == config


def test_the_toml_tells_every_default() -> None:
    values = tomllib.loads(toml_of(Config()))
    for key, setting in KNOWN.items():
        part, _, field = key.rpartition(".")
        if setting.default != "none" and part not in PARTS:
            table = values[part] if part else values
            assert field in table


leaves = st.integers() | st.text(max_size=3) | st.lists(st.integers(), max_size=2)
fields = st.dictionaries(st.sampled_from(["name", "rank", "alpha"]), leaves, max_size=3)
tables = st.dictionaries(st.sampled_from(["steps", "adapter", "loss"]), leaves | fields, max_size=3)


@quick
@given(tables, tables)
def test_laws_of_merging(below: dict[str, Any], above: dict[str, Any]) -> None:
    before = copy.deepcopy((below, above))
    both = merged(below, above)
    assert merged(below, {}) == below and merged({}, above) == above
    assert merged(above, above) == above
    assert merged(both, above) == both
    assert set(both) == set(below) | set(above)
    assert all(both[key] == below[key] for key in set(below) - set(above))
    assert all(both[key] == value for key, value in above.items() if not isinstance(value, str | dict))
    assert (below, above) == before


@pytest.mark.parametrize(
    ("below", "above", "expected"),
    [
        ("SGD", {"momentum": 0.9}, {"name": "SGD", "momentum": 0.9}),
        ({"momentum": 0.9}, "SGD", {"name": "SGD", "momentum": 0.9}),
        ({"name": "SGD", "momentum": 0.9}, {"momentum": 0.5}, {"name": "SGD", "momentum": 0.5}),
        ({"name": "SGD", "momentum": 0.9}, "SGD", {"name": "SGD", "momentum": 0.9}),
        ({"name": "AdamW", "beta1": 0.5}, "SGD", {"name": "SGD"}),
        ({"name": "AdamW", "beta1": 0.5}, {"name": "SGD", "momentum": 0.9}, {"name": "SGD", "momentum": 0.9}),
        ("AdamW", "SGD", "SGD"),
    ],
)
def test_merging_parts(below: Any, above: Any, expected: Any) -> None:
    assert merged({"optimizer": below}, {"optimizer": above}) == {"optimizer": expected}


@pytest.mark.parametrize("part", PARTS)
def test_a_written_config_takes_another_part_by_name(part: str) -> None:
    written = tomllib.loads(toml_of(Config()))
    for name in KNOWN[part].rule.removeprefix("one of ").split(", "):
        assert configured(merged(written, parsed([f"--{part}", name])[1])) == configured({part: name})
