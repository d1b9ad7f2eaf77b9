"""The model card of an adapter: a pure function of its config."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pema.adapter.config import AdapterConfig

FIGURES = {
    "held_out_cross_entropy": "cross-entropy of P_PEMA on held-out pairs (nats per token)",
    "start_cross_entropy": "the same before training",
    "held_out_reconstruction": "reconstruction error on held-out pairs (mean square per entry)",
    "pairs": "training pairs",
    "held_out_pairs": "held-out pairs",
    "best_epoch": "epoch of the lowest held-out loss",
    "epochs": "epochs trained",
    "train_seconds": "training time (seconds)",
    "parameters": "trained parameters",
}


PRIVACY = {
    "epsilon": "epsilon spent",
    "delta": "delta",
    "noise_multiplier": "noise multiplier (standard deviation of the noise in clip norms)",
    "clip_norm": "clip norm of one example's gradient",
    "sampling_rate": "sampling rate (Poisson)",
    "steps": "steps",
    "unit": "unit",
    "examples": "examples (public)",
    "accountant": "accountant",
}


def card(config: AdapterConfig) -> str:
    """Return README.md: what the adapter is, how to use it, its figures and their signature."""
    name = config.plm.name if config.plm else None
    hub = f"base_model: {json.dumps(name)}\n" if name and name.count("/") == 1 else ""
    front = f"---\nlibrary_name: pema\n{hub}tags:\n- pema\n- adapter\n---\n"
    residual = "f + " if config.residual else ""
    copies = f", copies from the prompt (width {config.copy_width})" if config.copy_width else ""
    equation = f"h_pd = {residual}B_pd " + ("gelu(A norm(f))" if config.activation == "gelu" else "A f")
    lines = [
        front,
        f"# PEMA adapter{f' for {name}' if name else ''}",
        "",
        "A Plug-in External Memory Adaptation adapter (Kim, Kim and Bak, NAACL 2024, arXiv 2311.08590): its next-token",
        "distribution is interpolated with that of the frozen language model that it was trained for.",
        "",
        "| | |",
        "|---|---|",
        f"| language model | {name or 'not recorded'} |",
        f"| task | {config.task or 'not recorded'} |",
        f"| template | {json.dumps(config.template, ensure_ascii=False) if config.template else 'not recorded'} |",
        f"| prompts | {_prompts(config)} |",
        f"| contexts | {config.contexts or 'not recorded'} |",
        f"| schedule of the mixture weight | {_schedule(config)} |",
        f"| maximum output length | {config.max_new_tokens or '2 SL + 16'} tokens |",
        f"| stop strings | {', '.join(f'`{json.dumps(each)}`' for each in config.stop) or 'none'} |",
        f"| adapter | {equation}, r = {config.rank}, d = {config.d}, {config.vocabulary} vocabulary{copies} |",
    ]
    if config.plm:
        lines += [
            f"| PLM fingerprint | `{config.plm.fingerprint}` |",
            f"| tokenizer fingerprint | `{config.plm.tokenizer_fingerprint}` |",
            f"| head fingerprint | `{config.plm.head_fingerprint}` |",
        ]
    figures = config.training.get("figures", {})
    if "epsilon" in figures:
        lines += ["", "## Privacy", "", *_privacy(figures)]
    if figures:
        lines += ["", "## Figures", "", "| | |", "|---|---|"]
        for key, meaning in FIGURES.items():
            value = figures.get(key)
            if value is not None:
                lines.append(
                    f"| {meaning} | {value:,.4f} |" if isinstance(value, float) else f"| {meaning} | {value:,} |"
                )
    if "signature" in config.training:
        signature = json.dumps(config.training["signature"], indent=2, ensure_ascii=False)
        lines += ["", "Signature of these figures:", "", "```json", signature, "```"]
    lines += [
        "",
        "## Use",
        "",
        "```",
        f"pema generate ADAPTER --plm {name or 'PLM'}{'' if config.task else ' --task TASK'} --input FILE -o FILE",
        "```",
        "",
        "```python",
        f'plm = pema.PLM.from_pretrained("{name or "PLM"}")',
        'texts = plm.generate(sources, pema.Adapter.from_pretrained("ADAPTER"))',
        "```",
    ]
    return "\n".join(lines) + "\n"


def _prompts(config: AdapterConfig) -> str:
    """Return the form of its prompts in one line."""
    if config.chat_template is None:
        return "plain" if config.template else "not recorded"
    system = f", system prompt {json.dumps(config.system, ensure_ascii=False)}" if config.system else ""
    return f"a chat{system}; SHA-256 of the chat template `{config.chat_template}`"


def _schedule(config: AdapterConfig) -> str:
    """Return the schedule that it generates with, in one line."""
    values = config.choose_schedule().to_dict()
    name = values.pop("schedule")
    settings = "".join(f", {key} {value}" for key, value in values.items() if not isinstance(value, list))
    return f"{name}{settings}" + ("; one fitted to held-out examples is stored too" if config.fitted else "")


def _privacy(figures: Mapping[str, Any]) -> list[str]:
    """Return the guarantee of DP-SGD and the figures that it follows from, as lines."""
    lines = [
        "Trained with DP-SGD: (epsilon, delta)-differentially private with one example (all its pairs together) as the",
        "unit. Neighbouring training sets differ in one example, which is blank in one of them. Losses on the training",
        "data are not published, and the random numbers of the noise are not stored.",
        "",
        "| | |",
        "|---|---|",
    ]
    for key, meaning in PRIVACY.items():
        value = figures.get(key)
        lines.append(f"| {meaning} | {value:.6g} |" if isinstance(value, float) else f"| {meaning} | {value} |")
    return lines
