"""JSON Schemas of what ``--json`` prints, by command. ``python tools/render_schemas.py`` writes them to docs/schemas/.

They name what may be relied on: a key that is listed as required stays, with its type. More keys may come.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

STRING, BOOL, COUNT = {"type": "string"}, {"type": "boolean"}, {"type": "integer", "minimum": 0}
NUMBER, OBJECT = {"type": "number"}, {"type": "object"}
MAYBE = {"type": ["number", "null"]}
TEXT_OR_NULL = {"type": ["string", "null"]}


def thing(required: dict[str, Schema], optional: dict[str, Schema] | None = None) -> Schema:
    """An object with keys that are always there, and others that may be."""
    return {"type": "object", "properties": required | (optional or {}), "required": list(required)}


def many(item: Schema) -> Schema:
    return {"type": "array", "items": item}


def by_name(value: Schema) -> Schema:
    return {"type": "object", "additionalProperties": value}


SCORES = thing(
    {
        "part": STRING, "metric": STRING, "rows": COUNT, "complete": NUMBER,
        "missing": many(thing({"rate": NUMBER, "realised": many(MAYBE), "score": NUMBER})),
        "mean_missing": MAYBE,
    },
    {"reliance": {"type": ["object", "null"]}},
)  # fmt: skip

SCORE = thing({"mean": NUMBER, "sd": MAYBE, "se": NUMBER, "low": NUMBER, "high": NUMBER, "best": BOOL})
COMPARISON = thing(
    {"dataset": STRING, "metric": STRING, "seeds": many(COUNT), "scores": by_name(by_name(SCORE)), "differences": many(OBJECT)}
)  # fmt: skip
FINDINGS = thing({"data": STRING, "comparisons": by_name(COMPARISON), "methods": OBJECT})
SHIFT: dict[str, Schema] = {"differences": {}, "shift": {}}

SCHEMAS: dict[str, Schema] = {
    "train": thing(
        {
            "schema_version": COUNT, "mmc_fast_version": STRING, "run_dir": STRING, "seed": COUNT, "method": STRING, "label": STRING,
            "config": OBJECT, "data": OBJECT, "environment": OBJECT, "history": many(OBJECT), "selected_epoch": COUNT,
            "selected_val_score": NUMBER, "adversarial": {"type": ["object", "null"]}, "ranking": {"type": ["object", "null"]},
            "unimodal": {"type": ["object", "null"]}, "distillation": {"type": ["object", "null"]}, "scores": SCORES,
            "other_scores": by_name(SCORES), "timing": by_name(NUMBER),
        }
    ),
    "evaluate": thing(
        {
            "schema_version": COUNT, "run": STRING, "label": STRING, "same_data": BOOL, "scores": SCORES,
            "data": thing({"name": STRING, "modalities": many(STRING)}),
        },
        SHIFT,
    ),
    "predict": thing(
        {"run": STRING, "data": STRING, "out": TEXT_OR_NULL, "rows": COUNT, "task": OBJECT, **SHIFT},
        {"predictions": many(OBJECT)},
    ),
    "diagnose": thing(
        {
            "schema_version": COUNT, "modalities": by_name(COUNT), "n_samples": COUNT, "metric": TEXT_OR_NULL,
            "measures": by_name(thing({"value": MAYBE, "error": MAYBE, "low": MAYBE, "high": MAYBE})),
            "verdicts": many(thing({"modality": STRING, "kind": STRING, "evidence": OBJECT})), "settings": OBJECT, "notes": many(STRING),
        }
    ),
    "compare": many(FINDINGS),
    "demo": thing({"out": STRING, "plan": OBJECT, "data_sets": many(FINDINGS)}),
    "reproduce": thing(
        {
            "name": STRING, "title": STRING, "data": many(STRING), "left_out": by_name(STRING), "seeds": many(COUNT),
            "directions": many(OBJECT), "seconds": NUMBER, "jobs": COUNT,
        }
    ),
    "data list": many(thing({"name": STRING, "found": BOOL, "what": STRING, "licence": STRING, "get": STRING})),
    "data prepare": thing({"name": STRING, "path": STRING, "bytes": COUNT, "state": STRING}),
    "data check": by_name(STRING),
    "info": thing(
        {
            "mmc_fast": STRING, "python": STRING, "platform": STRING, "packages": by_name(TEXT_OR_NULL), "cpu": OBJECT,
            "gpus": many(STRING), "native": thing({"native": BOOL}), "data_sets": {"type": ["array", "null"]}, "environment": OBJECT,
        }
    ),
    "selftest": many(thing({"name": STRING, "passed": BOOL, "detail": STRING})),
    "bench": many(thing({"name": STRING, "shape": STRING, "isa": STRING, "milliseconds": NUMBER, "ratio": NUMBER})),
}  # fmt: skip


def schema(command: str) -> Schema:
    """The whole document of one command, as in docs/schemas/."""
    return {"$schema": "http://json-schema.org/draft-07/schema#", "title": f"mmc-fast {command} --json"} | SCHEMAS[
        command
    ]
