"""The picture of an answer, from a completion as the server gives it."""

import math

import httpx
import pytest

from gate.evaluation.explain import PALETTE, ask, blend, from_completion, write_html, write_png
from gate.evaluation.results import EvaluationError


def completion(*entries):
    content = [{"token": token, "expert_weights": weights} for token, weights in entries]
    return {"model": "demo", "choices": [{"logprobs": {"content": content}}]}


ANSWER = from_completion(
    "<2+3?",
    completion(
        ("<b>", {"math": 1.0, "text": 0.0}),
        ("\n", {"math": 0.5, "text": 0.5}),
        ("&", {"math": 3.0, "text": -1.0}),
    ),
)


def test_shares_are_of_magnitudes_and_entropy_is_in_bits():
    assert [token.shares for token in ANSWER.tokens] == [[1, 0], [0.5, 0.5], [0.75, 0.25]]
    assert [token.entropy for token in ANSWER.tokens] == pytest.approx([0, 1, 2 - 0.75 * math.log2(3)])


def test_colours_mix_by_share():
    assert blend([1.0, 0.0], list(PALETTE[:2])) == PALETTE[0]
    assert blend([0.5, 0.5], ["#000000", "#ff8040"]) == "#804020"


def test_html_escapes_what_the_model_wrote_and_shows_coefficients(tmp_path):
    write_html(ANSWER, tmp_path / "a.html")
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert "&lt;b&gt;" in page
    assert "<b>" not in page.replace('<b style="background', "")
    assert "&lt;2+3?" in page
    assert "math 3.00, text -1.00; entropy 0.81 bits" in page


def test_png(tmp_path):
    write_png(ANSWER, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_png_of_texts_that_look_like_formulas(tmp_path):
    formula = completion((r"$\odd$", {"math": 1.0, "text": 0.0}))
    write_png(from_completion(r"Solve $\begin{x}$ now", formula), tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_an_answer_without_weights_is_refused():
    with pytest.raises(EvaluationError, match="no expert_weights"):
        from_completion("?", {"model": "other", "choices": [{"logprobs": {"content": [{"token": "a"}]}}]})


def test_the_key_of_a_server_that_wants_one(monkeypatch):
    def post(url, *, json, headers, timeout):
        assert headers == {"authorization": "Bearer k"}
        return httpx.Response(200, json=completion(("a", {"math": 1.0})))

    monkeypatch.setenv("POLYLOGIT_API_KEY", "k")
    monkeypatch.setattr(httpx, "post", post)
    assert ask("http://127.0.0.1:1/v1", None, "x", 1).tokens[0].text == "a"
