"""The sampler of serving loops: against sampling row by row in bits, cost, bad input."""

from __future__ import annotations

import copy
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import DTYPES, same_bits
from test_penalties import PENALTIES
from test_sample import COMMON, make_logits

import headway as hw
from headway import reference
from headway._sampling import bans
from headway._sampling.dialects import rules

FILTERS: dict[str, list[Any]] = {
    "dynamic_temperature_range": [None, 0.5],
    "top_n_sigma": [None, 1.5],
    "top_k": [None, 3],
    "top_p": [None, 0.8],
    "min_p": [None, 0.1],
    "typical_p": [None, 0.7],
    "epsilon_cutoff": [None, 0.02],
    "xtc_probability": [None, 0.5],
    "min_tokens_to_keep": [1, 2],
}


@given(st.data())
@settings(max_examples=60)
def test_a_sampler_equals_row_by_row_sampling(data: st.DataObject) -> None:
    """Rows come, go and draw in any order; each draws what it draws alone, and what the reference's sampler draws."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    V = data.draw(st.sampled_from([4, 70]))
    sampler, other = hw.Sampler(V), reference.Sampler(V)
    alone: dict[int, hw.Sampler] = {}
    prompts: dict[int, int] = {}
    for _ in range(data.draw(st.integers(1, 25))):
        action = data.draw(st.sampled_from(["admit", "step", "step", "retire", "force", "truncate", "fork"]))
        if action == "admit":
            dialect = data.draw(st.sampled_from([None, None, "hf", "llama.cpp", "mlx"]))
            filters = {name: data.draw(st.sampled_from(values)) for name, values in FILTERS.items()}
            if dialect is None:
                filters["ties"] = data.draw(st.sampled_from(["lowest_id", "keep"]))
                filters["nucleus"] = data.draw(st.sampled_from(["after_top_k", "joint"]))
            if "xtc_special_tokens" not in rules(dialect, "after_top_k").lacks():
                filters["xtc_special_tokens"] = data.draw(st.sampled_from([None, [3, 0]]))
            params = hw.SamplingParams(
                temperature=data.draw(st.sampled_from([0.7, 1.5] if dialect == "hf" else [0.0, 0.7, 1.5])),
                dialect=dialect,
                **{name: value for name, value in filters.items() if name not in rules(dialect, "after_top_k").lacks()},
                position=data.draw(st.sampled_from([None, 11])),
                logit_bias=data.draw(st.sampled_from([None, {1: 2.0}])),
                allowed=data.draw(
                    st.sampled_from([None, [0, 2, 3], np.arange(V) > 0, np.full(-(-V // 32), -2, np.int32)])
                ),
            )
            call: dict[str, Any] = {
                "prompt_tokens": rng.integers(0, V, int(rng.integers(0, 90))),
                "output_tokens": rng.integers(0, V, data.draw(st.sampled_from([0, 0, 5]))),
                "seed": int(rng.integers(99)),
                "count_prompt": data.draw(st.booleans()),
            }
            if data.draw(st.booleans()):
                call["stream"] = int(rng.integers(2**63))
            if data.draw(st.booleans()):
                call |= {"unknown_tokens": "ignore", "prompt_tokens": rng.integers(-2, V + 2, int(rng.integers(90)))}
            if data.draw(st.booleans()):
                call |= {"repetition": 1.3, "frequency": 0.1, "window": data.draw(st.sampled_from([None, 5]))}
                call |= {"dry_window": data.draw(st.sampled_from([None, 9])), "frequency_window": 7}
            if data.draw(st.booleans()):
                call |= {"dry_multiplier": 0.8, "dry_allowed_length": 1, "dry_breakers": [0]}
            if data.draw(st.booleans()):  # which leave at least one token
                call |= {"stop_tokens": [1], "min_tokens": 4, "banned_sequences": [[1, 0], [0, 0, 0]]}
            handle = sampler.admit(params, **call)
            prompts[handle] = len(call["prompt_tokens"])
            assert other.admit(params, **call) == handle
            alone[handle] = hw.Sampler(V)
            alone[handle].admit(params, **call)
        elif action == "retire" and alone:
            handle = data.draw(st.sampled_from(list(alone)))
            sampler.retire(handle)
            other.retire(handle)
            del alone[handle]
        elif action in ("force", "truncate") and alone:
            at = data.draw(st.integers(0, len(alone) - 1))
            handle, one = list(alone.items())[at]
            length = len(other.history(handle))
            number = data.draw(st.integers(0, V - 1) if action == "force" else st.integers(prompts[handle], length))
            for each, row in ((sampler, handle), (other, handle), (one, one.handles[0])):
                getattr(each, action)(row, number)
        elif action == "fork" and alone:
            parent = data.draw(st.sampled_from(list(alone)))
            own = data.draw(st.sampled_from([{}, {"stream": 5}, {"seed": 3}, {"seed": 3, "stream": 2**64 - 1}]))
            handle = sampler.fork(parent, **own)
            assert other.fork(parent, **own) == handle
            alone[handle], prompts[handle] = copy.deepcopy(alone[parent]), prompts[parent]
            (old,) = alone[handle].handles
            alone[handle].fork(old, seed=other.rows[handle]["seed"], stream=other.rows[handle]["stream"])
            alone[handle].retire(old)
        elif action == "step":
            logits = (rng.standard_normal((len(alone), V)) * 2).astype(DTYPES[data.draw(st.sampled_from(list(DTYPES)))])
            kinds = [None, np.arange(V) != 3, np.full(-(-V // 32), -6, np.int32), [0, 2, 3]]
            kinds += [mask[None] for mask in kinds[1:3]]
            masks = [data.draw(st.sampled_from(kinds)) for _ in alone]
            n = data.draw(st.sampled_from([None, 0, 3]))
            drawn, want = (each.step(logits, allowed=masks, logprobs=n) for each in (sampler, other))
            if n is None:
                assert same_bits(drawn, want)
            else:
                for got, expected in zip((*drawn.raw, *drawn.processed), (*want.raw, *want.processed), strict=True):
                    assert (got is None) == (expected is None)
                    if got is not None:
                        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)
                drawn, want = drawn.tokens, want.tokens
                assert same_bits(drawn, want)
            for token, row, mask, one in zip(drawn, logits, masks, alone.values(), strict=True):
                assert one.step(row[None], allowed=[mask])[0] == token


@given(st.data())
@settings(max_examples=120)
def test_verified_drafts_equal_the_reference(data: st.DataObject) -> None:
    """Drafts of any lengths, of rows with penalties and bans, drawn as they say or as a row of the target draws."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    V, rows, n = data.draw(st.sampled_from([4, 70])), data.draw(st.integers(1, 5)), data.draw(st.integers(0, 4))
    sampler, other, *alone = hw.Sampler(V), reference.Sampler(V), *(hw.Sampler(V) for _ in range(rows))
    for i in range(rows):
        dialect = data.draw(st.sampled_from([None, "hf", "llama.cpp"]))
        params = hw.SamplingParams(
            temperature=data.draw(st.sampled_from([0.7, 1.5])),
            top_p=data.draw(st.sampled_from([None, 0.8])),
            dialect=dialect,
            allowed=data.draw(st.sampled_from([None, [0, 2, 3]])),
            position=data.draw(st.sampled_from([None, 7])),
        )
        call: dict[str, Any] = {
            "prompt_tokens": rng.integers(0, V, int(rng.integers(90))),
            "seed": int(rng.integers(9)),
        }
        if data.draw(st.booleans()):
            call |= {"repetition": 1.3, "frequency": 0.4, "window": data.draw(st.sampled_from([None, 5]))}
        if data.draw(st.booleans()):
            call |= {"dry_multiplier": 0.8, "dry_allowed_length": 1, "dry_breakers": [0]}
        if data.draw(st.booleans()):
            call |= {"stop_tokens": [1], "min_tokens": 4, "banned_sequences": [[1, 0], [0, 0, 0]]}
        for each in (sampler, other, alone[i]):
            each.admit(params, **call)
    for _ in range(2):  # the second time after what the first has accepted
        dtype = DTYPES[data.draw(st.sampled_from(list(DTYPES)))]
        target, draft = ((rng.standard_normal((rows, k, V)) * 2).astype(dtype) for k in (n + 1, n))
        lengths = data.draw(st.none() | st.just(rng.integers(0, n + 1, rows)))
        given: dict[str, Any] = {"lengths": lengths}
        drafts_by = copy.deepcopy(sampler)
        own = data.draw(st.sampled_from(["none", "rows", "params"]))
        if own == "none":  # a draft without a choice: now and then what the target draws
            guesses = [drafts_by.step(target[:, i]) for i in range(n)]
        elif own == "rows":
            given["draft_logits"], guesses = draft, [drafts_by.step(draft[:, i]) for i in range(n)]
        else:
            given |= {"draft_logits": draft, "draft_params": hw.SamplingParams(temperature=1.3)}
            guesses = [hw.sample(draft[:, i], temperature=1.3, seed=i) for i in range(n)]
        tokens = np.array(guesses, np.int64).reshape(n, rows).T
        if lengths is not None:  # padding
            behind = np.arange(n) >= lengths[:, None]
            tokens[behind], draft[behind], target[:, 1:][behind] = -1, np.nan, np.nan
        if own != "rows" and data.draw(st.booleans()):
            some = np.arange(V) != 3
            given["allowed"] = [None if rng.random() < 0.4 else [some] * (n + 1) for _ in range(rows)]
        got, want = sampler.verify(target, tokens, **given), other.verify(target, tokens, **given)
        assert all(same_bits(a, b) for a, b in zip(got, want, strict=True))
        for i, one in enumerate(alone):
            row = {name: x if name == "draft_params" or x is None else x[i : i + 1] for name, x in given.items()}
            same = one.verify(target[i : i + 1], tokens[i : i + 1], **row)
            assert all(same_bits(a[i : i + 1], b) for a, b in zip(got, same, strict=True))
        for handle in range(rows):
            assert sampler.history(handle).tolist() == other.history(handle).tolist()
        after = rng.standard_normal((rows, V))
        assert same_bits(sampler.step(after), other.step(after))
        for i, one in enumerate(alone):
            one.step(after[i : i + 1])


def test_an_error_behind_accepted_tokens_leaves_the_counts() -> None:
    """The tokens of the first places are counted when the last place turns out to be NaN."""
    rng = np.random.default_rng(4)
    sampler = hw.Sampler(6)
    for _ in range(3):
        sampler.admit(hw.SamplingParams(temperature=0), [1, 2], frequency=0.7, dry_multiplier=0.8, window=5)
    for _ in range(20):
        logits = rng.standard_normal((3, 4, 6)) * 0.3
        greedy, going_on = copy.deepcopy(sampler), copy.deepcopy(sampler)
        tokens = np.stack([greedy.step(logits[:, i]) for i in range(3)], 1)  # all of which are accepted
        logits[2, 3, 0] = np.nan
        with pytest.raises(ValueError, match=r"NaN at token 0 in row \(2, 3\)"):
            sampler.verify(logits, tokens)
        for _ in range(3):
            again = rng.standard_normal((3, 6)) * 0.3
            assert sampler.step(again).tolist() == going_on.step(again).tolist()


@given(st.lists(st.integers(0, 3), max_size=12), st.data())
@settings(max_examples=200)
def test_bans_equal_the_reference(history: list[int], data: st.DataObject) -> None:
    drawn = data.draw(st.integers(0, len(history)))
    stop_tokens = data.draw(st.lists(st.integers(0, 3), max_size=2))
    own: dict[str, Any] = {
        "stop_tokens": stop_tokens,
        "min_tokens": data.draw(st.integers(0, 4)) if stop_tokens else 0,
        "banned_sequences": data.draw(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=3), max_size=3)),
        "no_repeat_ngram": data.draw(st.sampled_from([None, 1, 2, 3, 4])),
    }
    ours = bans.checked(**own, vocabulary=4).next(np.array(history, np.int64), drawn)
    sampler = reference.Sampler(4)
    row = sampler.admit(None, history[: len(history) - drawn], history[len(history) - drawn :], **own)
    assert sorted(set(ours.tolist())) == sampler._banned(row)


@given(st.data(), st.sampled_from(list(DTYPES)))
@settings(max_examples=150)
def test_a_draw_of_a_sampler_is_a_draw_of_what_penalize_made(data: st.DataObject, dtype: str) -> None:
    """For any type, where penalties are small beside the logits' steps, and where they leave float32."""
    rng, V = np.random.default_rng(data.draw(st.integers(0, 2**32))), 5
    kind = data.draw(st.sampled_from(["near ties", "too low for float32", *COMMON]))
    logits = make_logits(kind, dtype, (4, V), rng)
    sampler, rows = hw.Sampler(V), []
    for seed in range(4):
        own = {name: data.draw(values) for name, values in PENALTIES.items() if data.draw(st.booleans())}
        own |= {"presence": data.draw(st.sampled_from([0.05, 0.001, -0.0003]))}
        prompt, counts = rng.integers(0, V, 7).tolist(), data.draw(st.booleans())
        params = hw.SamplingParams(
            temperature=data.draw(st.sampled_from([0, 0.001, 1])),
            logit_bias=data.draw(st.sampled_from([None, {0: 0.003}, {1: -3e38}])),
            top_k=data.draw(st.sampled_from([None, 2])),
        )
        sampler.admit(params, prompt, seed=seed, count_prompt=counts, **own)
        rows.append((params, prompt, seed, own | {"prompt_lengths": 0 if counts else 7}))
    for _ in range(4):
        tokens = sampler.step(logits)
        for z, token, (params, history, seed, own) in zip(logits, tokens.tolist(), rows, strict=True):
            new = hw.penalize(z, history, **own)
            assert new.dtype == (np.float64 if dtype == "float64" else np.float32)
            assert token == hw.sample(new, params, seed=seed, position=len(history))
            history.append(token)


def test_a_sampler_knows_the_breakers_that_it_drew() -> None:
    sampler = hw.Sampler(3)
    sampler.admit(hw.SamplingParams(temperature=0), dry_multiplier=9, dry_allowed_length=1, dry_breakers=[0])
    for token in (1, 2, 0, 1, 2, 0):
        assert sampler.step([np.eye(3)[token] * 99]) == [token]
    assert sampler.step([[0.0, 1.0, 0.0]]) == [1]  # it came after 1 2 0 before, and would be penalized


def test_rows_with_different_filters_share_a_call() -> None:
    """What a row has not set is off for it: hundreds of draws would show a filter that is hardly so."""
    sampler, rng = hw.Sampler(70), np.random.default_rng(5)
    every = [hw.SamplingParams(seed=9, **{name: values[-1]}) for name, values in FILTERS.items()]
    for params in [hw.SamplingParams(seed=9), *every]:
        sampler.admit(params, stream=0)
    assert len(sampler._active.groups) == 1
    for j in range(300):
        logits = rng.standard_normal((1 + len(every), 70))
        tokens = sampler.step(logits)
        assert tokens[0] == hw.sample(logits[0], seed=9, position=j)
        assert tokens[1:].tolist() == [hw.sample(z, p, position=j) for z, p in zip(logits[1:], every, strict=True)]
    for words in ({"dialect": "hf"}, {"ties": "keep"}, {"nucleus": "joint"}):
        sampler.admit(hw.SamplingParams(**words))
    assert len(sampler._active.groups) == 4


def test_rows_without_bias_or_mask_are_not_given_one() -> None:
    """The others have none of (V,) each, unless few would be left to a call. Who goes leaves the rest as it was."""
    V, rng = 70, np.random.default_rng(5)

    def groups(special: dict[int, dict[str, Any]]) -> tuple[list[int], list[bool]]:
        sampler = hw.Sampler(V)
        each = [hw.SamplingParams(seed=i, top_k=9, **special.get(i, {})) for i in range(24)]
        for params in each:
            sampler.admit(params)
        found = sampler._active.groups
        logits = rng.standard_normal((24, V))
        assert sampler.step(logits).tolist() == [hw.sample(z, p) for z, p in zip(logits, each, strict=True)]
        sampler.retire(23)
        kept = [new.settings is old.settings for new, old in zip(sampler._active.groups, found, strict=True)]
        assert kept == [True] * (len(found) - 1) + [False]
        dense = [any(np.size(value) >= V for value in vars(group.settings).values()) for group in found]
        return [len(group.handles) for group in found], dense

    bias, mask = {"logit_bias": {5: 1.0}}, {"allowed": [1, 2, 5]}
    assert groups({}) == ([24], [False])
    assert groups({2: bias, 3: bias, 5: mask}) == ([2, 2, 1, 1, 18], [False, True, False, True, False])
    assert groups(dict.fromkeys(range(0, 24, 2), bias)) == ([24], [True])


def test_a_sampler_costs_little_more_than_the_draw() -> None:
    """32 rows of 128,256 with penalties over a history of 500. The limit leaves room for a busy machine."""
    rows, V = 32, 128_256
    rng = np.random.default_rng(3)
    logits = (rng.standard_normal((rows, V)) * 3).astype(np.float32)
    sampler = hw.Sampler(V)
    for i in range(rows):
        params = hw.SamplingParams(temperature=0.8, top_k=50)
        sampler.admit(params, rng.integers(0, V, 500), seed=i, repetition=1.1, frequency=0.1, dry_multiplier=0.8)

    def milliseconds(call: Any) -> float:
        took = []
        for _ in range(9):
            start = time.process_time()
            call()
            took.append(time.process_time() - start)
        return 1e3 * min(took)

    step = milliseconds(lambda: sampler.step(logits))
    draw = milliseconds(lambda: hw.sample(logits, temperature=0.8, top_k=50, seed=np.arange(rows)))
    print(f"a step {step:.2f} ms, the draw alone {draw:.2f} ms")
    assert step < 4 * draw + 2


BAD_ROWS = [
    ({"params": {"temperature": 1}}, TypeError, r"^params: expected SamplingParams"),
    (
        {"params": hw.SamplingParams(top_k=[1, 2])},
        ValueError,
        r"^top_k: expected one value for the row, got shape \(2,\)",
    ),
    ({"params": hw.SamplingParams(uniform=0.5)}, ValueError, r"^uniform: expected seed and position"),
    ({"params": hw.SamplingParams(allowed=[70])}, ValueError, r"^allowed: expected ids from 0 to 69, got 70"),
    ({"params": hw.SamplingParams(logit_bias=np.zeros(7))}, ValueError, r"^logit_bias: expected a last axis of 70"),
    (
        {"prompt_tokens": [3, 70], "repetition": 2},
        ValueError,
        r"^prompt_tokens: expected ids from 0 to 69, got 70 at 1; .*ignore",
    ),
    ({"unknown_tokens": None}, ValueError, r"^unknown_tokens: expected one of 'error', 'ignore', got None"),
    ({"count_prompt": 1}, TypeError, r"^count_prompt: expected True or False, got 1"),
    ({"stream": -1}, ValueError, r"^stream: expected an integer from 0 to 18446744073709551615, got -1"),
    ({"stream": 0.5}, TypeError, r"^stream: expected an integer"),
    ({"prompt_tokens": [[1]]}, ValueError, r"^prompt_tokens: expected a list of token ids, got shape \(1, 1\)"),
    ({"prompt_tokens": [0.5]}, TypeError, r"^prompt_tokens: expected integers"),
    ({"output_tokens": [0, -1]}, ValueError, r"^output_tokens: expected integers from 0 to 69, got -1 at 1"),
    ({"frequency": [1.0]}, ValueError, r"^frequency: expected one value for the row"),
    ({"repetition": 0}, ValueError, r"^repetition: expected"),
    ({"presense": 1}, TypeError, r"^presense: no such option; expected one of params, "),
    (
        {"temperature": 0.5},
        TypeError,
        r"^temperature: no such option; give `params=hw.SamplingParams\(t",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD_ROWS, ids=[b[2][:40] for b in BAD_ROWS])
def test_bad_rows(call: dict[str, Any], error: type[Exception], message: str) -> None:
    sampler = hw.Sampler(70)
    with pytest.raises(error, match=message):
        sampler.admit(**call)
    assert sampler.handles == []


BAD_MASKS = [
    (np.ones(70, bool), ValueError, r"^allowed: expected a mask for each active row, of shape \(2, 70\) for bool or"),
    (np.ones((2, 2), np.int32), ValueError, r"or \(2, 3\) for packed int32, .*got a packed mask of shape \(2, 2\)"),
    (np.ones((2, 70), np.float32), TypeError, r"^allowed: expected a bool mask"),
    (np.array([1, 2]), ValueError, r"^allowed: expected a mask for each active row, .*got ids of shape \(2,\)"),
    ({1, 2}, ValueError, r"^allowed: expected a mask for each active row"),
    ([None], ValueError, r"^allowed: expected 2 masks, one for each active row, got 1"),
    ([None, np.ones(7, bool)], ValueError, r"^allowed\[1\]: expected a last axis of 70, one for each token"),
    ([np.ones((2, 70), bool), None], ValueError, r"^allowed\[0\]: .* broadcasts to \(70,\), got \(2, 70\)"),
    ([np.ones((1, 2, 3), np.int32), None], ValueError, r"^allowed\[0\]: .* broadcasts to \(3,\), got \(1, 2, 3\)"),
    ([None, np.ones(2, np.int32)], ValueError, r"^allowed\[1\]: expected a packed mask of 3 32-bit words"),
    ([None, [70]], ValueError, r"^allowed\[1\]: expected ids from 0 to 69, got 70"),
    ([3, 5], TypeError, r"^allowed\[0\]: expected a bool mask"),
    ([None, "abc"], TypeError, r"^allowed\[1\]: expected a bool mask"),
    ("ab", TypeError, r"^allowed: expected a bool mask"),
]


@pytest.mark.parametrize(("allowed", "error", "message"), BAD_MASKS, ids=[b[2][:40] for b in BAD_MASKS])
def test_bad_masks(allowed: Any, error: type[Exception], message: str) -> None:
    sampler, logits = hw.Sampler(70), np.zeros((2, 70))
    handles = [sampler.admit(seed=i) for i in range(2)]
    with pytest.raises(error, match=message):
        sampler.step(logits, allowed=allowed)
    assert sampler.handles == handles
    assert sampler.step(logits).tolist() == hw.sample(logits, seed=[0, 1]).tolist()
