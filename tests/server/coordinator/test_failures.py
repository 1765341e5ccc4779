"""Experts that die, hang, or give rubbish."""

from __future__ import annotations

import pytest

from server.coordinator.links import ExpertLink
from server.expert.worker import Worker
from server.policy import Contrastive, Product, Single, Uniform
from server.request import FinishReason
from server.wire.expert import GetRows, WholeRows
from server.wire.supervisor import ExpertDown
from tests.support.coordinator.alone import HALF, along, assert_alone, assert_details, generate, shares
from tests.support.coordinator.harness import Deployment
from tests.support.coordinator.random_requests import request
from tests.support.fake_engine import Behaviour, FakeEngine

# --- an expert is lost ---


def test_wait_goes_on_exactly_where_it_was(tmp_path, rng, models):
    engines = [FakeEngine(models[0]), FakeEngine(models[1], Behaviour(fail_at=6))]
    with Deployment(tmp_path, engines, on_expert_loss="wait") as deployment:
        requests = [request(rng, max_tokens=15) for _ in range(4)]
        deployment.submit(*requests)
        deployment.lose(1)
        deployment.until(lambda: deployment.statuses[-1].experts["b"] == "down")
        assert not deployment.statuses[-1].ready
        during = request(rng)
        deployment.submit(during)
        deployment.start(1, FakeEngine(models[1]))
        deployment.finish(*requests, during)
        everything = [*requests, during]
        assert_alone(deployment, everything, [generate(each, models, HALF) for each in everything])
        assert [(status.ready, status.experts["b"]) for status in deployment.statuses] == [
            (True, "up"),
            (False, "down"),
            (False, "starting"),
            (True, "up"),
        ]
        stats = deployment.stats()
    assert [expert.restarts for expert in stats.experts] == [0, 1]


@pytest.mark.parametrize("loss", ["wait", "degrade", "fail"])
def test_no_token_is_fused_without_the_whole_row_that_a_dying_expert_was_asked_for(tmp_path, rng, models, loss):
    """It dies after its fourth report, before it answers the question about it. What has not asked it goes on."""
    engines = [FakeEngine(models[0], Behaviour(chunk=9)), FakeEngine(models[1], Behaviour(chunk=30))]
    settings = {"list_length": 4, "on_expert_loss": loss, "unanswered": {1: 4}}
    with Deployment(tmp_path, engines, **settings) as deployment:
        both = [request(rng, lengths, top_logprobs=1, temperature=0.0) for lengths in ((9, 9), (3, 12), (30, 8))]
        only_a = request(rng, (5, 0), Single("a"), top_logprobs=1, temperature=0.0)
        deployment.submit(*both, only_a)
        deployment.lose(1)
        if loss == "wait":
            deployment.start(1, FakeEngine(models[1]))
        deployment.finish(*both, only_a)
        assert_alone(deployment, [only_a], [generate(only_a, models, shares([1, 0]))])
        for each in both:
            tokens, details = deployment.tokens[each.id], deployment.details[each.id]
            before = len(tokens) if loss != "degrade" else sum(detail.coefficients[1] > 0 for detail in details)
            gone = (lambda at: lambda expert, step: expert and step >= at)(before)
            alone = generate(each, models, HALF, gone=gone)
            assert tokens == alone.tokens[: len(tokens)]
            assert_details(details, tokens, along(each, models, HALF, tokens, gone=gone), error=1e-3 + 1e-5)
            assert (len(tokens) == len(alone.tokens)) == (deployment.ended[each.id].reason is FinishReason.LENGTH)
            assert (deployment.ended[each.id].message == "expert b was lost") == (loss == "fail")
        assert [(order.expert, order.message) for order in deployment.restarts] == [
            (1, "no answer when asked for rows")
        ]


@pytest.mark.parametrize("answer", [None, b"", b"\0" * 12])
def test_an_expert_that_answers_with_other_than_the_rows_is_replaced(tmp_path, rng, models, monkeypatch, answer):
    """As one on another host may; none of it is taken for rows."""
    right, wrong = Worker._answer, []

    def answer_once(worker: Worker, question: GetRows) -> None:
        if worker._expert == 1 and not wrong:
            wrong.append(question)
            worker._channel.send(WholeRows(question.number, answer))
        else:
            right(worker, question)

    monkeypatch.setattr(Worker, "_answer", answer_once)
    monkeypatch.setattr(ExpertLink, "row_memory", lambda link, slots: None)
    with Deployment(tmp_path, [FakeEngine(model) for model in models], list_length=4) as deployment:
        one = request(rng, top_logprobs=1, temperature=0.0)
        deployment.submit(one)
        deployment.until(lambda: bool(deployment.restarts))
        deployment.kill(1)
        deployment.start(1, FakeEngine(models[1]))
        deployment.finish(one)
        assert_alone(deployment, [one], [generate(one, models, HALF)])
        assert [order.message for order in deployment.restarts] == ["no answer when asked for rows"]


def test_a_lost_expert_holds_nothing(tmp_path, rng, models):
    """Neither while it is down nor when it is back and idle; what it was asked for is counted on."""
    engines = [FakeEngine(models[0]), FakeEngine(models[1], Behaviour(fail_at=6))]
    with Deployment(tmp_path, engines, on_expert_loss="fail") as deployment:
        one = request(rng, max_tokens=15)
        deployment.submit(one)
        deployment.until_stats(lambda stats: stats.experts[1].kv_used > 0 and stats.experts[1].running > 0)
        deployment.lose(1)
        down = deployment.until_stats(lambda stats: not stats.experts[1].up).experts[1]
        deployment.start(1, FakeEngine(models[1]))
        back = deployment.until_stats(lambda stats: stats.experts[1].up).experts[1]
        assert [(expert.kv_used, expert.running) for expert in (down, back)] == [(0.0, 0)] * 2
        assert down.prefilled_tokens > 0
        deployment.finish(one)


def test_an_expert_may_be_lost_again_and_again(tmp_path, rng, models):
    engines = [FakeEngine(models[0], Behaviour(chunk=8)), FakeEngine(models[1], Behaviour(fail_at=4))]
    with Deployment(tmp_path, engines, on_expert_loss="wait") as deployment:
        requests = [request(rng, max_tokens=15) for _ in range(3)]
        deployment.submit(*requests)
        for fail_at in (5, 3, None):
            deployment.lose(1)
            deployment.start(1, FakeEngine(models[1], Behaviour(fail_at=fail_at, chunk=10)))
        deployment.finish(*requests)
        assert_alone(deployment, requests, [generate(each, models, HALF) for each in requests])


def test_an_expert_that_comes_back_smaller_ends_what_no_longer_fits(tmp_path, rng, models):
    engines = [FakeEngine(models[0]), FakeEngine(models[1], Behaviour(fail_at=4))]
    with Deployment(tmp_path, engines, on_expert_loss="wait", limits={"sequences": 3}) as deployment:
        fits, shortened = request(rng), request(rng, max_tokens=60)
        too_long, waiting = request(rng, (9, 100)), request(rng, (9, 100))
        deployment.submit(fits, shortened, too_long, waiting)
        deployment.lose(1)
        deployment.start(1, FakeEngine(models[1], Behaviour(kv_tokens=64)))
        deployment.finish(fits, shortened, too_long, waiting)
        assert_alone(deployment, [fits], [generate(fits, models, HALF)])
        assert deployment.ended[shortened.id].reason is FinishReason.LENGTH
        assert len(deployment.tokens[shortened.id]) == 64 - len(shortened.prompts[1])
        assert deployment.ended[too_long.id].message == "an expert came back with too small a KV cache"
        assert deployment.ended[waiting.id].code == "too_long"


def test_degrade_goes_on_without_the_expert(tmp_path, rng, models):
    """Step n chooses token n - 1, so the first four come from both experts and the rest from the one that is left."""
    engines = [FakeEngine(models[0]), FakeEngine(models[1], Behaviour(fail_at=5))]
    with Deployment(tmp_path, engines, on_expert_loss="degrade") as deployment:
        both, only_b = request(rng), request(rng, (0, 9), Single("b"))
        deployment.submit(both, only_b)
        deployment.lose(1)
        deployment.finish(both, only_b)
        assert_alone(deployment, [both], [generate(both, models, HALF, gone=lambda expert, step: expert and step >= 4)])
        assert deployment.ended[only_b.id].reason is FinishReason.ERROR
        assert deployment.ended[only_b.id].message == "expert b was lost"
        assert deployment.statuses[-1].ready and deployment.statuses[-1].experts["b"] == "down"

        later = request(rng)
        deployment.run(later)
        assert_alone(deployment, [later], [generate(later, models, HALF, gone=lambda expert, step: expert == 1)])

        waiting, other = request(rng, (0, 9), Single("b")), request(rng)
        deployment.submit(waiting)
        deployment.run(other)  # is not held up by the one that waits for b
        assert waiting.id not in deployment.ended
        deployment.start(1, FakeEngine(models[1]))
        deployment.finish(waiting)
        again = request(rng)
        deployment.run(again)
        expected = [generate(waiting, models, shares([0, 1])), generate(again, models, HALF)]
        assert_alone(deployment, [waiting, again], expected)


def test_degrade_ends_what_stood_on_the_lost_expert_and_keeps_what_it_only_corrected(tmp_path, rng, models):
    engines = [FakeEngine(models[0]), FakeEngine(models[1], Behaviour(fail_at=5))]
    with Deployment(tmp_path, engines, on_expert_loss="degrade") as deployment:
        led, corrected = request(rng, policy=Contrastive("b", "a")), request(rng, policy=Contrastive("a", "b"))
        deployment.submit(led, corrected)
        deployment.lose(1)
        deployment.finish(led, corrected)
        assert deployment.ended[led.id].reason is FinishReason.ERROR
        assert deployment.ended[led.id].message == "expert b was lost"
        assert deployment.ended[corrected.id].reason is not FinishReason.ERROR

        waiting, other = request(rng, policy=Contrastive("b", "a")), request(rng)
        deployment.submit(waiting)
        deployment.run(other)
        assert waiting.id not in deployment.ended
        deployment.start(1, FakeEngine(models[1]))
        deployment.finish(waiting)
        assert deployment.ended[waiting.id].reason is not FinishReason.ERROR


def test_fail_ends_the_sequences_of_the_expert_and_no_others(tmp_path, rng, models):
    engines = [FakeEngine(models[0], Behaviour(pause=0.002)), FakeEngine(models[1], Behaviour(fail_at=5))]
    with Deployment(tmp_path, engines, on_expert_loss="fail") as deployment:
        both, only_a = request(rng), request(rng, (9, 0), Single("a"), max_tokens=30)
        deployment.submit(both, only_a)
        deployment.lose(1)
        deployment.finish(both, only_a)
        ended = deployment.ended[both.id]
        assert (ended.reason, ended.message) == (FinishReason.ERROR, "expert b was lost")
        assert deployment.tokens[both.id] == generate(both, models, HALF).tokens[:4]
        assert_alone(deployment, [only_a], [generate(only_a, models, shares([1, 0]))])
        deployment.start(1, FakeEngine(models[1]))
        again = request(rng)
        deployment.run(again)
        assert_alone(deployment, [again], [generate(again, models, HALF)])


def test_a_hanging_expert_is_given_up_and_replaced(tmp_path, rng, models):
    engines = [FakeEngine(models[0]), FakeEngine(models[1], Behaviour(hang_at=5))]
    with Deployment(tmp_path, engines, limits={"tick_seconds": 0.4}) as deployment:
        requests = [request(rng) for _ in range(3)]
        deployment.submit(*requests)
        deployment.until(lambda: bool(deployment.restarts))
        order = deployment.restarts[0]
        assert (order.expert, order.generation) == (1, 0) and "0.4 s" in order.message
        deployment.kill(1)
        deployment.start(1, FakeEngine(models[1]))
        deployment.finish(*requests)
        assert_alone(deployment, requests, [generate(each, models, HALF) for each in requests])
        assert len(deployment.restarts) == 1


def test_news_of_a_process_that_was_replaced_is_old(tmp_path, rng, models):
    engines = [FakeEngine(models[0]), FakeEngine(models[1])]
    with Deployment(tmp_path, engines, on_expert_loss="fail") as deployment:
        deployment.kill(1)
        deployment.start(1, FakeEngine(models[1]))
        deployment.until(lambda: [status.ready for status in deployment.statuses] == [True, False, False, True])
        deployment.tell(ExpertDown(1, 0, "ended with exit code -9"))
        one = request(rng)
        deployment.run(one)
        assert_alone(deployment, [one], [generate(one, models, HALF)])
        assert deployment.statuses[-1].ready and len(deployment.statuses) == 4


def test_what_waits_while_an_engine_hangs_is_answered(tmp_path, rng, models):
    """Aborts, refusals and questions do not wait for the engines' step."""
    engines = [FakeEngine(models[0]), FakeEngine(models[1], Behaviour(hang_at=3))]
    with Deployment(tmp_path, engines, limits={"sequences": 1, "queue": 0}) as deployment:
        running, refused = request(rng), request(rng)
        deployment.submit(running)
        deployment.until(lambda: engines[1].steps == 3)
        deployment.run(refused)
        assert deployment.ended[refused.id].code == "overloaded"
        deployment.abort(running.id)
        assert deployment.until_stats(lambda stats: stats.running == 0).finished["abort"] == 1
        engines[1].killed.set()
        deployment.lose(1)


# --- an expert gives rubbish ---


@pytest.mark.parametrize("kind", ["nan", "empty"])
def test_unusable_rows_are_masked_and_counted(tmp_path, rng, models, kind):
    """The second expert has nothing to say where its history is a multiple of four long."""
    behaviour = Behaviour(**{kind: lambda tokens: len(tokens) % 4 == 0})
    with Deployment(tmp_path, [FakeEngine(models[0]), FakeEngine(models[1], behaviour)]) as deployment:
        requests = [
            request(rng, (7, 9), policy, stop_token_ids=[3]) for policy in (Uniform(), Product(), Uniform("prob"))
        ]
        deployment.run(*requests)
        expected = [
            generate(each, models, weigh, prob_space=prob, gone=lambda expert, step: expert and (9 + step) % 4 == 0)
            for each, weigh, prob in zip(
                requests, (HALF, lambda said, step: dict.fromkeys(said, 1.0), HALF), (False, False, True), strict=True
            )
        ]
        assert_alone(deployment, requests, expected)
        masked = sum((9 + step) % 4 == 0 for alone in expected for step in range(len(alone.tokens)))
        assert [expert.masked_rows for expert in deployment.stats().experts] == [0, masked]


def test_contrastive_decoding_ends_where_its_expert_has_nothing_to_say(tmp_path, rng, models):
    """The amateur alone is what the client asked to move away from."""
    engines = [FakeEngine(models[0]), FakeEngine(models[1], Behaviour(nan=lambda tokens: len(tokens) >= 12))]
    with Deployment(tmp_path, engines) as deployment:
        one = request(rng, (9, 9), Contrastive("b", "a", mu=0.3, plausibility=0.0), stop_token_ids=[3, 4], seed=4)
        deployment.run(one)
        alone = generate(one, models, lambda said, step: {1: 1.0, 0: -0.3})
        assert deployment.tokens[one.id] == alone.tokens[:3] != alone.tokens
        ended = deployment.ended[one.id]
        assert (ended.reason, ended.message) == (FinishReason.ERROR, "no usable probabilities")


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"stop_token_ids": [3]},
        {"logit_bias": {5: 1.0}},
        {"top_logprobs": 2},
        {"expert_weights": True},
        {"record": True, "top_logprobs": 0},
    ],
    ids=str,
)
def test_where_no_expert_has_anything_to_say_the_sequence_ends(tmp_path, rng, models, fields):
    """Not even a token that the request names may be chosen then."""
    engines = [FakeEngine(model, Behaviour(nan=lambda tokens: len(tokens) == 12)) for model in models]
    with Deployment(tmp_path, engines) as deployment:
        doomed, fine = request(rng, (9, 9), temperature=0.0, **fields), request(rng, (20, 20))
        deployment.run(doomed, fine)
        alone = generate(doomed, models, HALF)
        assert len(alone.tokens) > 3
        ended = deployment.ended[doomed.id]
        assert (ended.reason, ended.message) == (FinishReason.ERROR, "no usable probabilities")
        assert deployment.tokens[doomed.id] == alone.tokens[:3]
        assert_alone(deployment, [fine], [generate(fine, models, HALF)])
