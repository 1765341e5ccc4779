"""A picture of one answer: every token in the colours of the experts that chose it, the entropy of their shares below.

Made from a chat completion with `logprobs` and `expert_weights`; as HTML that stands alone, and as PNG. E experts.
Knows nothing of gates: any policy's coefficients can be shown.
"""

import html
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from gate.evaluation.endpoint import key_header
from gate.evaluation.results import EvaluationError

PALETTE = ("#4aa8e8", "#eeae2a", "#e08fbd", "#2fbd93", "#f27c34", "#8fd0f7", "#f0e442", "#b5b5b5")
"""The playground's, for readers with any kind of colour vision (Okabe and Ito 2008); dark text is legible on each."""
_INK = "#1d1c1a"
TOKENS_A_ROW = 24
_VISIBLE = {" ": "␣", "\n": "⏎", "\t": "⇥", "": "∅"}


@dataclass(frozen=True, slots=True)
class Token:
    """One token of an answer."""

    text: str
    """What it adds to the answer."""
    shares: list[float]
    """[E], each expert's |c_i| / sum |c_j|."""
    coefficients: dict[str, float]
    """Expert -> c_i."""

    @property
    def entropy(self) -> float:
        """Of the shares, in bits: 0 when one expert decides alone, log2 E when all weigh the same."""
        return sum(-share * math.log2(share) for share in self.shares if share > 0)


@dataclass(frozen=True, slots=True)
class ExplainedAnswer:
    """An answer to one prompt, token by token."""

    model: str
    """Which answered."""
    prompt: str
    """The user's message."""
    experts: list[str]
    """[E], names."""
    tokens: list[Token]
    """Of the answer, in order."""

    @property
    def colours(self) -> list[str]:
        return [PALETTE[index % len(PALETTE)] for index in range(len(self.experts))]


def ask(url: str, model: str | None, prompt: str, max_tokens: int) -> ExplainedAnswer:
    """The greedy answer of the endpoint at `url` (which ends in /v1). Raises EvaluationError."""
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0,
        "max_tokens": max_tokens,
        "logprobs": True,
        "expert_weights": True,
    }
    if model is not None:
        body["model"] = model
    try:
        response = httpx.post(f"{url}/chat/completions", json=body, headers=key_header(), timeout=300.0)
    except httpx.HTTPError as error:
        raise EvaluationError(f"{url}: {error or type(error).__name__}") from None
    if response.is_error:
        raise EvaluationError(f"{response.status_code} {response.text[:300]}")
    return from_completion(prompt, response.json())


def from_completion(prompt: str, reply: dict[str, Any]) -> ExplainedAnswer:
    """What an OpenAI chat completion object says. Raises EvaluationError where it carries no expert weights."""
    content = (reply["choices"][0].get("logprobs") or {}).get("content") or []
    if not content or any("expert_weights" not in entry for entry in content):
        raise EvaluationError("the answer carries no expert_weights: is this a polylogit server?")
    experts = list(content[0]["expert_weights"])
    return ExplainedAnswer(reply["model"], prompt, experts, [_token(entry) for entry in content])


def write_html(answer: ExplainedAnswer, path: Path) -> None:
    """One file without scripts or links; every token tells its coefficients where the mouse rests on it."""
    cells = "".join(_html_token(answer, token) for token in answer.tokens)
    legend = "".join(
        f'<span class="key"><i style="background:{colour}"></i>{html.escape(name)}</span>'
        for name, colour in zip(answer.experts, answer.colours, strict=True)
    )
    page = _PAGE.format(
        title=html.escape(answer.model),
        prompt=html.escape(answer.prompt),
        legend=legend,
        cells=cells,
        bits=f"{math.log2(max(2, len(answer.experts))):.2f}",
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


def write_png(answer: ExplainedAnswer, path: Path) -> None:
    """The same with matplotlib, `TOKENS_A_ROW` tokens a row."""
    from matplotlib.figure import Figure

    starts = range(0, len(answer.tokens), TOKENS_A_ROW)
    width = min(TOKENS_A_ROW, len(answer.tokens))
    size = (max(5.0, 0.55 * width + 1.2), 0.9 + 1.7 * len(starts))
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(f"{answer.model}: {_ellipsis(answer.prompt, 90)}", fontsize=10, parse_math=False)
    panels = figure.subplots(2 * len(starts), 1, squeeze=False, height_ratios=[1.0, 0.8] * len(starts))[:, 0]
    for row, start in enumerate(starts):
        tokens = answer.tokens[start : start + TOKENS_A_ROW]
        _draw_tokens(panels[2 * row], answer, tokens, width)
        _draw_entropies(panels[2 * row + 1], answer, tokens, width)
    _draw_legend(figure, answer)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def blend(shares: list[float], colours: list[str]) -> str:
    """The mean of hexadecimal colours, weighted by shares."""
    channels = [[int(colour[at : at + 2], 16) for at in (1, 3, 5)] for colour in colours]
    mixed = [sum(share * channel[i] for share, channel in zip(shares, channels, strict=True)) for i in range(3)]
    return "#" + "".join(f"{round(value):02x}" for value in mixed)


def _token(entry: dict[str, Any]) -> Token:
    coefficients = entry["expert_weights"]
    total = sum(abs(value) for value in coefficients.values()) or 1.0
    return Token(entry["token"], [abs(value) / total for value in coefficients.values()], coefficients)


def _html_token(answer: ExplainedAnswer, token: Token) -> str:
    weights = ", ".join(f"{name} {value:.2f}" for name, value in token.coefficients.items())
    height = 100 * token.entropy / math.log2(max(2, len(answer.experts)))
    return (
        f'<span class="token" title="{html.escape(f"{weights}; entropy {token.entropy:.2f} bits", quote=True)}">'
        f'<b style="background:{blend(token.shares, answer.colours)}">{html.escape(_shown(token.text))}</b>'
        f'<i class="bar"><i style="height:{height:.0f}%"></i></i></span>'
    )


def _draw_tokens(panel: Any, answer: ExplainedAnswer, tokens: list[Token], width: int) -> None:
    """Each token's box divided among the experts from the bottom up, its text across."""
    for place, token in enumerate(tokens):
        bottom = 0.0
        for share, colour in zip(token.shares, answer.colours, strict=True):
            panel.bar(place, share, 0.94, bottom=bottom, color=colour, linewidth=0)
            bottom += share
        shown = _ellipsis(_shown(token.text), 8)
        panel.text(
            place, 0.5, shown, ha="center", va="center", family="monospace", weight="bold", color=_INK,
            fontsize=13 if len(shown) <= 3 else 8, parse_math=False,
        )  # fmt: skip
    panel.set(xlim=(-0.6, width - 0.4), ylim=(0, 1), xticks=[], yticks=[0, 1])
    panel.set_ylabel("share", fontsize=8)
    panel.tick_params(labelsize=7)
    panel.spines[:].set_visible(False)


def _draw_entropies(panel: Any, answer: ExplainedAnswer, tokens: list[Token], width: int) -> None:
    panel.bar(range(len(tokens)), [token.entropy for token in tokens], 0.94, color="#555555")
    panel.set(xlim=(-0.6, width - 0.4), ylim=(0, math.log2(max(2, len(answer.experts)))), xticks=[])
    panel.set_ylabel("entropy, bits", fontsize=8)
    panel.tick_params(labelsize=7)
    panel.spines[["top", "right"]].set_visible(False)


def _draw_legend(figure: Any, answer: ExplainedAnswer) -> None:
    from matplotlib.patches import Patch

    keys = [Patch(color=colour, label=name) for name, colour in zip(answer.experts, answer.colours, strict=True)]
    figure.legend(handles=keys, loc="outside lower center", ncols=len(keys), frameon=False, fontsize=9)


def _shown(text: str) -> str:
    return _VISIBLE.get(text, text.replace("\n", "⏎"))


def _ellipsis(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title><style>
:root {{ color-scheme: light dark; }}
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem; }}
.prompt {{ opacity: .75; }}
.key {{ margin-right: 1.2em; }}
.key i {{ display: inline-block; width: .9em; height: .9em; border-radius: 2px; margin-right: .4em; }}
.tokens {{ display: flex; flex-wrap: wrap; gap: 1rem 2px; margin: 1.5rem 0; }}
.token b {{ display: block; padding: .15em .45em; min-width: 1.2em; text-align: center; color: #1d1c1a;
  font: bold 18px ui-monospace, monospace; border-radius: 3px; white-space: pre; }}
.bar {{ display: flex; align-items: flex-end; height: 48px; margin-top: 4px; border-bottom: 1px solid #8888; }}
.bar i {{ width: 100%; background: #888; }}
small {{ opacity: .75; }}
</style></head><body>
<h1>{title}</h1>
<p class="prompt">{prompt}</p>
<p>{legend}</p>
<div class="tokens">{cells}</div>
<small>Colour: the experts' shares of a token's coefficients. Bar: their entropy, 0 to {bits} bits; rest the mouse on a
token for its numbers.</small>
</body></html>
"""
