"""The configuration file: what is read, and the one line that says what is wrong with it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from server.config import load_config, parse_address, parse_config, parse_size
from server.errors import ConfigError, StartError
from server.policy import Contrastive, Select, Single, Uniform, Weights

A, B = {"name": "a", "model": "models/a"}, {"name": "b", "model": "models/b"}


def parse(**data):
    return parse_config({"name": "duo", "experts": [A, B], **data}, directory=Path("/srv"))


def problem(**data) -> str:
    with pytest.raises(ConfigError) as raised:
        parse(**data)
    message = str(raised.value)
    assert "\n" not in message
    return message


def expert(**data) -> str:
    """What is wrong with a second expert that has `data`."""
    return problem(experts=[A, {**B, **data}])


def test_the_file_as_it_is_written(tmp_path):
    path = tmp_path / "polylogit.yaml"
    path.write_text(
        """
        name: duo
        experts:
          - {name: a, model: models/a, cpus: [0, 1], kv_cache_memory: 64MiB, engine_args: {any_thing: {nested: 1}}}
          - {name: b, model: /models/b, device: cuda, gpus: [2, 3], tensor_parallel_size: 2, max_model_len: 4096}
        list_length: 16
        tolerance: 0.01
        default_policy: sharp
        policies:
          uniform: {}
          select:
          sharp: {rule: contrastive, expert: a, amateur: b, mu: 0.25}
        on_expert_loss: degrade
        limits: {sequences: 8, tick_seconds: 2}
        http: {port: 0, cors_origins: ["*"]}
        """,
        encoding="utf-8",
    )
    config = load_config(path)
    assert config.expert_names == ["a", "b"]
    assert config.experts[0].cpus == [0, 1] and config.experts[0].engine_args == {"any_thing": {"nested": 1}}
    assert (config.experts[1].device, config.experts[1].gpus, config.experts[1].max_model_len) == ("cuda", [2, 3], 4096)
    assert (config.list_length, config.tolerance, config.on_expert_loss) == (16, 0.01, "degrade")
    assert (config.limits.sequences, config.limits.tick_seconds, config.limits.queue) == (8, 2.0, 256)
    assert (config.http.port, config.http.cors_origins, config.http.host) == (0, ["*"], "127.0.0.1")
    assert config.policies == {
        "uniform": Uniform(),
        "select": Select(),
        "sharp": Contrastive("a", "b", mu=0.25),
    }
    assert config.path("models/a") == tmp_path / "models/a"
    assert config.path("/models/b") == Path("/models/b")


def test_models_offered_to_clients():
    config = parse(policies={"uniform": {}, "mix": {"rule": "weights", "weights": {"a": 1}}}, default_policy="mix")
    mix = Weights({"a": 1.0})
    assert config.models() == {
        "duo": mix,
        "duo:uniform": Uniform(),
        "duo:mix": mix,
        "duo:a": Single("a"),
        "duo:b": Single("b"),
    }
    assert next(iter(config.models())) == "duo"


def test_defaults():
    config = parse()
    assert config.policies == {"uniform": Uniform()}
    assert (config.default_policy, config.list_length, config.tolerance, config.gate) == ("uniform", 128, 1e-3, None)


@pytest.mark.parametrize(
    ("data", "key", "nearest"),
    [
        ({"list_lenth": 3}, "list_lenth", "list_length"),
        ({"limits": {"sequence": 3}}, "limits.sequence", "sequences"),
        ({"http": {"prot": 3}}, "http.prot", "port"),
        ({"gate": {"file": "gate.pt", "sha265": "0" * 64}}, "gate.sha265", "sha256"),
        ({"experts": [A, {**B, "dytpe": "auto"}]}, "experts.1.dytpe", "dtype"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_known_one(data, key, nearest):
    message = problem(**data)
    assert f"unknown key {key!r}" in message and f"did you mean {nearest!r}?" in message


@pytest.mark.parametrize(
    ("data", "key", "instead"), [({"top_k": 32}, "top_k", "list_length"), ({"missing": "tail"}, "missing", "tolerance")]
)
def test_a_key_of_older_files_is_named_with_what_became_of_it(data, key, instead):
    message = problem(**data)
    assert (
        f"there is no key {key!r} any more" in message and f"`{instead}`" in message and "did you mean" not in message
    )
    assert f"unknown key 'limits.{key}'" in problem(limits=data)


def test_an_unknown_key_without_a_near_one_lists_the_known():
    assert "known: host, port, api_keys_file" in problem(http={"zzz": 1})


def test_an_unknown_key_of_a_policy_is_named():
    message = problem(policies={"uniform": {"spaec": "prob"}})
    assert "spaec" in message and "$.policies" in message


def test_the_directory_is_not_a_key():
    assert "'directory'" in problem(directory="/etc")


@pytest.mark.parametrize(
    ("data", "where"),
    [
        ({"list_length": "many"}, "$.list_length"),
        ({"list_length": 0}, "$.list_length"),
        ({"list_length": True}, "$.list_length"),
        ({"experts": []}, "$.experts"),
        ({"experts": {"a": "models/a"}}, "$.experts"),
        ({"experts": [A, "models/b"]}, "$.experts[1]"),
        ({"experts": [{"name": "a"}]}, "model"),
        ({"name": "no spaces"}, "$.name"),
        ({"tolerance": 2.0}, "$.tolerance"),
        ({"limits": {"tick_seconds": 0}}, "$.limits.tick_seconds"),
        ({"limits": {"kv_watermark": 1.0}}, "$.limits.kv_watermark"),
        ({"limits": []}, "$.limits"),
        ({"http": {"port": 65536}}, "$.http.port"),
        ({"policies": ["uniform"]}, "$.policies"),
        ({"policies": {"uniform": "prob"}}, "$.policies"),
        ({"policies": {"average": {}}, "default_policy": "average"}, "average"),
        ({"gate": {"file": "gate.pt", "sha256": "ABC"}}, "$.gate.sha256"),
        ({"example_prompt": 3}, "$.example_prompt"),
    ],
)
def test_wrong_types_and_ranges_name_the_place(data, where):
    assert where in problem(**data)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"experts": [A, A]}, "two are named 'a'"),
        ({"policies": {"uniform": {}, "a": {"rule": "product"}}}, "also the name of an expert"),
        ({"default_policy": "gate"}, "default_policy: 'gate' is not one of uniform"),
        ({"policies": {"uniform": {}, "one": {"rule": "single", "expert": "c"}}}, "policies.one: no expert is named"),
        ({"policies": {"uniform": {}, "gate": {}}}, "policies.gate: needs a gate"),
        ({"policies": {"uniform": {}, "pick": {"rule": "select", "by": "gate"}}}, "policies.pick: needs a gate"),
        (
            {"policies": {"uniform": {}, "w": {"rule": "weights", "weights": {"a": 1e300, "b": 1}}}},
            "policies.w: coefficients must be from -1000 to 1000",
        ),
        (
            {"policies": {"uniform": {}, "c": {"rule": "contrastive", "expert": "a", "amateur": "b", "mu": math.nan}}},
            "policies.c: coefficients must be from -1000 to 1000",
        ),
        (
            {"policies": {"uniform": {}, "w": {"rule": "weights", "weights": {"a": 0, "b": 0}}}},
            "at least one must not be 0",
        ),
        (
            {"policies": {"uniform": {}, "w": {"rule": "weights", "space": "prob", "weights": {"a": 2, "b": -1}}}},
            "must not be negative in space prob",
        ),
        (
            {"experts": [A], "gate": {"file": "gate.pt"}, "policies": {"uniform": {}, "gate": {}}},
            "a gate needs at least two experts",
        ),
    ],
)
def test_contradictions(data, words):
    assert words in problem(**data)


def test_contradictions_of_an_expert():
    assert "experts.b.gpus: device is cpu" in expert(gpus=[0])
    assert "experts.b.cpus: device is cuda" in expert(device="cuda", cpus=[0])
    assert "experts.b.gpus: 1 given, tensor_parallel_size is 2" in expert(
        device="cuda", gpus=[0], tensor_parallel_size=2
    )
    assert "experts.b.kv_cache_memory: '64MB' is not a size" in expert(kv_cache_memory="64MB")


@pytest.mark.parametrize(
    ("text", "size"),
    [("1KiB", 1024), ("64MiB", 64 * 1024**2), ("1.5 GiB", 3 * 1024**3 // 2), (" 2TiB ", 2 * 1024**4)],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "64", "64MB", "-1GiB", "GiB", "1.GiB", "1GiB2"])
def test_what_is_no_size(text):
    with pytest.raises(ConfigError, match="is not a size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"- name: duo\n", "must be a mapping"),
        (b"", "must be a mapping"),
        (b"name: [", "not YAML"),
        (b"name: \xff\xfe", "cannot be read"),
        (b"name: duo\n", "experts"),
    ],
)
def test_files_that_are_no_configuration(tmp_path, content, words):
    path = tmp_path / "polylogit.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=words) as raised:
        load_config(path)
    assert str(raised.value).startswith(str(path)) and "\n" not in str(raised.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(StartError, match="cannot be read: No such file"):
        load_config(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("10.0.0.2:8100", ("10.0.0.2", 8100)),
        ("gpu-1.internal:80", ("gpu-1.internal", 80)),
        ("[fd00::2]:8100", ("fd00::2", 8100)),
    ],
)
def test_addresses(text, address):
    assert parse_address(text) == address
    assert parse(experts=[A, {**B, "address": text}]).experts[1].host == address[0]


@pytest.mark.parametrize(
    "text", ["", "10.0.0.2", ":8100", "10.0.0.2:0", "10.0.0.2:65536", "a b:1", "http://a:1", "::1:1"]
)
def test_what_is_no_address(text):
    assert expert(address=text) == f"configuration: experts.b.address: {text!r} is not an address such as 10.0.0.2:8100"


def test_no_two_experts_at_one_address():
    away = {"address": "10.0.0.2:8100"}
    assert (
        problem(experts=[{**A, **away}, {**B, **away}])
        == "configuration: experts.b.address: 10.0.0.2:8100 is also expert a's"
    )
