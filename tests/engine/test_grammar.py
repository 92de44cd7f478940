"""Guides: what a grammar allows after each token, how it meets EOS and min_tokens, and what happens when it fails."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from baton.errors import InvalidRequestError
from baton.requests import FinishReason, Grammar, GrammarKind, SamplingParams
from engine.cpu_kernels import choosing
from engine.grammar import Grammars, Guide, allowed_bias, mask_logits
from engine.sampling import sample
from engine.sampling_state import SamplingState
from tests.engine.checkpoints import BOS_ID, EOS_ID, PAD_ID, VOCAB_SIZE, write_tokenizer

# The model's vocabulary is padded beyond the tokenizer's, and the rows of bits to whole words beyond that.
PADDED = VOCAB_SIZE + 13
SECOND_EOS = PAD_ID


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder: pathlib.Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def grammars(folder: pathlib.Path) -> Iterator[Grammars]:
    made = Grammars(folder, vocab_size=PADDED, eos_token_ids=[EOS_ID, SECOND_EOS], num_threads=1)
    yield made
    made.close()


def params_of(**fields: Any) -> SamplingParams:
    return SamplingParams(
        **{"max_tokens": 100, "temperature": 0.0, "eos_token_ids": (EOS_ID, SECOND_EOS), "seed": 3, **fields}
    )


def state_of(grammars: Grammars, kind: str, *texts: str, **fields: Any) -> SamplingState:
    grammar = Grammar(GrammarKind(kind), texts)
    return SamplingState(params_of(**fields, grammar=grammar), (5,), grammar=grammars.compile(grammar).result(10))


def allowed(guide: Guide | None) -> set[int]:
    assert guide is not None
    logits = torch.zeros(1, PADDED)
    mask_logits(logits, [(0, guide)])
    return set((logits[0] == 0).nonzero().flatten().tolist())


def generate(state: SamplingState, logits: torch.Tensor) -> tuple[list[int], FinishReason]:
    """Samples from one row of logits [PADDED], again and again, until the choice ends."""
    token_ids: list[int] = []
    reason = FinishReason.NONE
    while reason is FinishReason.NONE:
        token_ids += sample(logits[None], [state]).token_ids
        state.append(token_ids[-1])
        assert state.error is None
        reason = state.finish_reason(token_ids[-1])
    return token_ids, reason


def noise(seed: int) -> torch.Tensor:
    return torch.randn(PADDED, generator=torch.Generator().manual_seed(seed)) * 3


class TestWhatIsAllowed:
    def test_only_what_the_grammar_can_go_on_with(self, grammars: Grammars, tokenizer: Tokenizer) -> None:
        state = state_of(grammars, "choice", "the", "then")
        assert {tokenizer.decode([token]) for token in allowed(state.guide)} <= {"t", "th", "the", "then"}
        state.extend(tokenizer.encode("the", add_special_tokens=False).ids)
        assert {tokenizer.id_to_token(token) for token in allowed(state.guide)} == {"n", "<eos>", "<pad>"}

    def test_special_tokens_and_padding_are_no_text(self, grammars: Grammars, tokenizer: Tokenizer) -> None:
        state = state_of(grammars, "json_object")
        state.extend(tokenizer.encode('{"', add_special_tokens=False).ids)
        ids = allowed(state.guide)
        # The text <bos> may well stand in a string; the token must not.
        assert set(tokenizer.encode("<bos>", add_special_tokens=False).ids) == {BOS_ID}
        assert not ids & {BOS_ID, EOS_ID, SECOND_EOS}
        assert max(ids) < VOCAB_SIZE
        assert len(ids) > VOCAB_SIZE // 2

    def test_rows_without_a_grammar_are_left_alone(self, grammars: Grammars) -> None:
        logits = noise(1).repeat(3, 1)
        guided = state_of(grammars, "regex", "a+")
        plain = SamplingState(params_of(), (5,))
        result = sample(logits, [plain, guided, plain])
        assert result.token_ids[0] == result.token_ids[2] == int(noise(1).argmax())
        assert torch.equal(logits, noise(1).repeat(3, 1))

    def test_logprobs_are_those_of_the_model(self, grammars: Grammars) -> None:
        state = state_of(grammars, "choice", "x", logprobs=2)
        (logprobs,) = sample(noise(2)[None], [state]).logprobs
        assert logprobs is not None
        assert logprobs.top[0][0] == int(noise(2).argmax())


class TestText:
    @pytest.mark.parametrize("seed", range(3))
    @pytest.mark.parametrize(
        "sampling", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 20}, {"temperature": 0.8, "top_p": 0.9}]
    )
    def test_every_way_of_sampling_follows_the_schema(
        self, grammars: Grammars, tokenizer: Tokenizer, seed: int, sampling: dict[str, Any]
    ) -> None:
        schema = {
            "type": "object",
            "properties": {"name": {"type": "string", "maxLength": 6}, "kind": {"enum": ["a", "b"]}},
            "required": ["name", "kind"],
            "additionalProperties": False,
        }
        state = state_of(grammars, "json_schema", json.dumps(schema), seed=seed, max_tokens=600, **sampling)
        token_ids, reason = generate(state, noise(seed))
        document = json.loads(tokenizer.decode(token_ids))
        assert reason is FinishReason.STOP
        assert len(document["name"]) <= 6
        assert document["kind"] in ("a", "b")

    def test_greedy_and_seeded_samples_are_the_same_again(self, grammars: Grammars) -> None:
        for sampling in ({}, {"temperature": 1.0, "top_p": 0.95}):
            first = generate(state_of(grammars, "regex", "[a-z ]{12}", **sampling), noise(4))
            assert generate(state_of(grammars, "regex", "[a-z ]{12}", **sampling), noise(4)) == first

    def test_forced_tokens_lead_to_the_same_place(self, grammars: Grammars) -> None:
        whole, _ = generate(state_of(grammars, "regex", "[a-z ]{12}"), noise(4))
        replay = state_of(grammars, "regex", "[a-z ]{12}")
        replay.extend(whole[:5])
        assert generate(replay, noise(4))[0] == whole[5:]

    def test_white_space_between_the_parts_of_json_is_bounded(self, grammars: Grammars, tokenizer: Tokenizer) -> None:
        logits = noise(5)
        logits[tokenizer.encode(" ", add_special_tokens=False).ids] = 50.0
        state = state_of(grammars, "json_schema", '{"type": "object", "additionalProperties": false}', max_tokens=200)
        token_ids, reason = generate(state, logits)
        assert (json.loads(tokenizer.decode(token_ids)), reason) == ({}, FinishReason.STOP)


class TestEnds:
    def single(self, tokenizer: Tokenizer, text: str) -> int:
        (token,) = tokenizer.encode(text, add_special_tokens=False).ids
        return int(token)

    def test_a_choice_ends_when_nothing_can_follow(self, grammars: Grammars, tokenizer: Tokenizer) -> None:
        # Neither ignored EOS nor min_tokens can make it go on.
        endless = {"eos_token_ids": (), "min_tokens": 50}
        for fields in ({}, {"eos_token_ids": ()}, {"min_tokens": 50}, endless):
            token_ids, reason = generate(state_of(grammars, "choice", "baton", **fields), noise(6))
            assert (tokenizer.decode(token_ids), reason) == ("baton", FinishReason.STOP)

    def test_max_tokens_cut_a_text_that_is_not_whole(self, grammars: Grammars) -> None:
        token_ids, reason = generate(state_of(grammars, "regex", "[a-z]{50,60}", max_tokens=4), noise(6))
        assert (len(token_ids), reason) == (4, FinishReason.LENGTH)

    def test_the_token_that_completes_the_text_stops_it_even_if_it_is_the_last_allowed(
        self, grammars: Grammars
    ) -> None:
        assert generate(state_of(grammars, "regex", "[a-z]", max_tokens=1), noise(6))[1] is FinishReason.STOP

    def test_every_eos_is_allowed_where_the_text_may_end(self, grammars: Grammars, tokenizer: Tokenizer) -> None:
        state = state_of(grammars, "regex", "a+")
        assert not allowed(state.guide) & {EOS_ID, SECOND_EOS}
        state.append(self.single(tokenizer, "a"))
        assert allowed(state.guide) >= {EOS_ID, SECOND_EOS}
        assert state.finish_reason(self.single(tokenizer, "a")) is FinishReason.NONE
        state.append(SECOND_EOS)
        assert state.finish_reason(SECOND_EOS) is FinishReason.STOP
        assert state.error is None

    @pytest.mark.parametrize("fields", [{"eos_token_ids": ()}, {"min_tokens": 3}])
    def test_eos_is_held_back_while_the_text_can_go_on(
        self, grammars: Grammars, tokenizer: Tokenizer, fields: dict[str, Any]
    ) -> None:
        state = state_of(grammars, "regex", "a+", **fields)
        state.append(self.single(tokenizer, "a"))
        assert allowed(state.guide) == {self.single(tokenizer, "a")}

    def test_an_eos_that_is_ignored_and_also_a_stop_token_stops(self, grammars: Grammars, tokenizer: Tokenizer) -> None:
        state = state_of(grammars, "regex", "a+", eos_token_ids=(), stop_token_ids=(EOS_ID,))
        state.append(self.single(tokenizer, "a"))
        assert allowed(state.guide) == {self.single(tokenizer, "a"), EOS_ID}

    def test_min_tokens_give_way_where_nothing_else_is_left(self, grammars: Grammars, tokenizer: Tokenizer) -> None:
        a = self.single(tokenizer, "a")
        state = state_of(grammars, "regex", "a+", stop_token_ids=(a,), min_tokens=5)
        assert allowed(state.guide) == {a}


class TestFailures:
    def test_a_token_against_the_grammar_ends_its_own_choice_only(
        self, grammars: Grammars, tokenizer: Tokenizer
    ) -> None:
        broken = state_of(grammars, "regex", "a+")
        broken.append(tokenizer.encode("z", add_special_tokens=False).ids[0])
        sound = state_of(grammars, "regex", "b{3}")
        result = sample(noise(1).repeat(2, 1), [broken, sound])
        assert isinstance(broken.error, InvalidRequestError)
        assert broken.error.field == "sampling.grammar"
        assert sound.error is None
        assert set(tokenizer.decode([result.token_ids[1]])) == {"b"}

    def test_an_invalid_grammar_is_refused_each_time(self, grammars: Grammars) -> None:
        for _ in range(2):
            with pytest.raises(InvalidRequestError, match=r"sampling.grammar.regex: .*unclosed group"):
                grammars.compile(Grammar(GrammarKind.REGEX, ("(a",))).result(10)

    def test_a_checkpoint_without_a_tokenizer_refuses_grammars_and_nothing_else(
        self, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        made = Grammars(tmp_path, vocab_size=PADDED, eos_token_ids=[EOS_ID], num_threads=1)
        assert "requests with a grammar will be refused" in caplog.text
        with pytest.raises(InvalidRequestError, match="tokenizer cannot be guided"):
            made.compile(Grammar(GrammarKind.JSON_OBJECT)).result(10)
        made.close()


class TestCompiling:
    def test_a_grammar_is_compiled_once_however_many_ask(self, grammars: Grammars) -> None:
        grammar = Grammar(GrammarKind.REGEX, ("once[0-9]",))
        futures = [grammars.compile(grammar) for _ in range(5)]
        assert len({id(future.result(10)) for future in futures}) == 1

    def test_those_used_last_are_kept(self, grammars: Grammars) -> None:
        def compiled(texts: Sequence[str]) -> list[int]:
            return [id(grammars.compile(Grammar(GrammarKind.CHOICE, (text,))).result(10)) for text in texts]

        (kept,) = compiled(["kept"])
        for index in range(70):
            compiled([f"other {index}"])
            assert compiled(["kept"]) == [kept]

    def test_choices_of_one_grammar_stand_each_where_its_own_tokens_led(
        self, grammars: Grammars, tokenizer: Tokenizer
    ) -> None:
        first, second = state_of(grammars, "choice", "ab", "cd"), state_of(grammars, "choice", "ab", "cd")
        first.extend(tokenizer.encode("a", add_special_tokens=False).ids)
        second.extend(tokenizer.encode("c", add_special_tokens=False).ids)
        assert {tokenizer.decode([token]) for token in allowed(first.guide)} == {"b"}
        assert {tokenizer.decode([token]) for token in allowed(second.guide)} == {"d"}


@pytest.mark.parametrize("vocabulary", [1, 31, 64, 100])
def test_the_kernel_excludes_what_torch_would(vocabulary: int) -> None:
    words = np.random.default_rng(vocabulary).integers(-(2**31), 2**31, (4, -(-vocabulary // 32))).astype(np.int32)
    words[0], words[1] = 0, -1
    logits = torch.randn(6, vocabulary)
    expected = logits.clone()
    rows = [5, 0, 2, 3]
    expected[rows] += allowed_bias(torch.from_numpy(words.view(np.uint8)))[:, :vocabulary]
    choosing.exclude(logits.numpy(), np.array(rows), words)
    assert torch.equal(logits, expected)
