"""What a nano still knows of language: `python -m benchmarks.language OUT.json MODEL [MODEL …]`.

Fresh scenes of the world (evaluation seeds): perplexity of captions as text alone; perplexity of
what is said of a picture that is seen; and how many of its questions (how many, what colour, what
is left of it, where) a greedy answer gets right, word by word. Half a minute a model.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import hidream
from hidream.eval.statistics import wilson
from hidream.models.o1.batch import collate
from hidream.models.o1.tokens import encode_text
from hidream.text_request import TextRequest
from hidream.train.losses import text_loss
from hidream.world.sample import Sample
from hidream.world.tasks import eval_seed, sample

SEED, SIDE, AT_ONCE = 14, 128, 20
DESCRIBED = ("Describe the picture.", "What is in the picture?", "Write a caption.")
NUM_TEXTS, NUM_QUESTIONS = 400, 200


@torch.inference_mode()
def perplexity(pipe: Any, items: list[Sample]) -> float:
    """Of the answers' tokens, the last of which ends them."""
    total, tokens = 0.0, 0
    for first in range(0, len(items), AT_ONCE):
        requests, said, start = [], [], 0
        for item in items[first : first + AT_ONCE]:
            answer = pipe.tokenizer.encode(item.answer)
            answer.append(pipe.tokenizer.special["<|im_end|>"])
            seen = [Image.fromarray(picture) for picture in item.reference_pictures(SIDE, SIDE)]
            config = pipe.model.config
            requests.append(encode_text(pipe.tokenizer, config, item.prompt, seen, answer))
            start += len(requests[-1].input_ids)
            said += range(start - len(answer) - 1, start - 1)
        batch, asked = collate(requests), torch.tensor(said)
        logits = pipe.model(batch, asked=asked).logits
        total += float(text_loss(logits, batch.input_ids[asked + 1], 1))
        tokens += len(said)
    return math.exp(total / tokens)


def answers(pipe: Any) -> dict[str, Any]:
    """How many questions are answered as the scene has it."""
    drawn = (sample("understanding", eval_seed(SEED), index) for index in count())
    items = list(islice((i for i in drawn if i.prompt not in DESCRIBED), NUM_QUESTIONS))
    requests = [
        TextRequest(
            prompt=item.prompt,
            pictures=tuple(map(Image.fromarray, item.reference_pictures(SIDE, SIDE))),
            max_new_tokens=12,
        )
        for item in items
    ]
    said = [output.text.strip() for output in pipe.generate_text(requests)]
    right = sum(text == item.answer for text, item in zip(said, items, strict=True))
    low, high = wilson(right, len(items))
    return {"n": len(items), "right": right / len(items), "ci95": [round(low, 4), round(high, 4)]}


def measure(model: str) -> dict[str, Any]:
    """The three of a model's folder or name."""
    pipe = hidream.load(model)
    texts = {
        task: [sample(task, eval_seed(SEED), index) for index in range(NUM_TEXTS)]
        for task in ("language", "understanding")
    }
    row = {f"perplexity_{task}": round(perplexity(pipe, t), 4) for task, t in texts.items()}
    return {"model": model, **row, "answers": answers(pipe)}


def main() -> None:
    parser = argparse.ArgumentParser(description="What a nano knows of language.")
    parser.add_argument("out", type=Path)
    parser.add_argument("models", nargs="+")
    arguments = parser.parse_args()
    rows = [measure(model) for model in arguments.models]
    text = json.dumps({"seed": SEED, "rows": rows}, indent=1)
    sys.stdout.write(text + "\n")
    arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
