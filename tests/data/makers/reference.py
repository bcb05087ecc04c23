"""Real text with the per-token loss of a real model, for the tests that run SmolLM2 itself."""

import json
from pathlib import Path

KEPT = ("name", "source", "model", "oracle", "text_sha256", "mean_nll", "text", "token_ids", "nll")


def compact(source: Path, out: Path) -> None:
    """Copies the passages without spaces between numbers, `nll` to 6 decimals."""
    folder = out / "reference"
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.glob("*.json")):
        passage = json.loads(path.read_text(encoding="utf-8"))
        passage = {key: passage[key] for key in KEPT}
        passage["nll"] = [round(value, 6) for value in passage["nll"]]
        text = json.dumps(passage, ensure_ascii=False, separators=(",", ":"))
        (folder / path.name).write_text(text + "\n", encoding="utf-8")


def training_text() -> list[str]:
    """What the small tokenizers are trained on: the committed 2k passages, line by line."""
    folder = Path(__file__).parents[1] / "reference"
    lines = []
    for name in ("emma-2k", "northanger-2k"):
        passage = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        lines += passage["text"].splitlines(keepends=True)
    return lines
