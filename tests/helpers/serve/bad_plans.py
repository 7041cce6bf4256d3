"""Requests to `/v1/plan` and `/v1/predict` that must be refused, with status, code and parameter.

The server takes images of at most 20,000 bytes and 100,000 pixels, budgets up to 1000, 8 actions of
a prediction, 2 zones, and bodies of 200,000 bytes.
"""

from __future__ import annotations

import base64
import os
from typing import Any

from helpers.serve.embeddings import base64_of, bomb, data_uri, encoded, picture
from helpers.serve.planning import frame_at, png_of, raw_of

SEEN, WANTED = png_of(frame_at(3, 3)), png_of(frame_at(9, 9))
PNG = encoded(picture(0))
DEEP = "[" * 5_000 + "]" * 5_000


def plan(**fields: Any) -> dict[str, Any]:
    return {"observation": SEEN, "goal": WANTED} | fields


def predict(**fields: Any) -> dict[str, Any]:
    return {"frames": SEEN, "actions": [[1, 0], [0, 1]]} | fields


def without(name: str, body: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in body.items() if key != name}


Case = tuple[str, Any, int, str, str | None]

PLANS: list[Case] = [
    ("no body", b"", 400, "invalid_json", None),
    ("not JSON", b"{observation:", 400, "invalid_json", None),
    ("NaN", b'{"observation": "x", "goal": "x", "caution": NaN}', 400, "invalid_json", None),
    ("deep nesting", f'{{"goal": {DEEP}}}'.encode(), 400, "invalid_json", None),
    ("a JSON list", [SEEN, WANTED], 400, "invalid_type", None),
    ("no observation", without("observation", plan()), 400, "missing_field", "observation"),
    ("no goal", without("goal", plan()), 400, "missing_field", "goal"),
    ("misspelt field", plan(budgets=3), 400, "unknown_field", "budgets"),
    ("a field of predictions", plan(actions=[[0, 0]]), 400, "unknown_field", "actions"),
    ("unknown model", plan(model="maze"), 404, "model_not_found", "model"),
    ("null", plan(observation=None), 400, "invalid_type", "observation"),
    ("a number", plan(goal=3), 400, "unsupported_modality", "goal"),
    ("a list of pictures", plan(goal=[WANTED]), 400, "invalid_type", "goal"),
    ("more frames than a state has", plan(observation=[SEEN] * 2), 400, "invalid_value",
     "observation"),
    ("no frames", plan(observation=[]), 400, "invalid_value", "observation"),
    ("a bad frame in a list", plan(observation=[""]), 400, "empty", "observation[0]"),
    ("empty string", plan(goal=""), 400, "empty", "goal"),
    ("plain text", plan(goal="the door"), 400, "invalid_base64", "goal"),
    ("both wrong", plan(observation="a b", goal=""), 400, "invalid_base64", "observation"),
    ("no image", plan(goal=base64_of(b"hello")), 400, "not_an_image", "goal"),
    ("truncated", plan(goal=data_uri(PNG[:200])), 400, "truncated", "goal"),
    ("data URI of text", plan(goal=data_uri(b"x", "text/html")), 400, "unsupported_media_type",
     "goal"),
    ("a video", plan(goal={"video": "AAAA"}), 400, "unsupported_modality", "goal.video"),
    ("a URL", plan(goal="https://example.com/a.png"), 400, "url_not_allowed", "goal"),
    ("a URL in an object", plan(goal={"url": "http://[::1]/x"}), 400, "url_not_allowed",
     "goal.url"),
    ("bomb", plan(goal=data_uri(bomb())), 400, "too_many_pixels", "goal"),
    ("too many bytes", plan(goal=base64_of(os.urandom(20_001))), 413, "image_too_large", "goal"),
    ("raw of another size", plan(goal={"raw": base64_of(bytes(32 * 32 * 3 - 1))}), 400,
     "invalid_value", "goal.raw"),
    ("empty raw", plan(goal={"raw": ""}), 400, "invalid_value", "goal.raw"),
    ("raw without base64", plan(goal={"raw": "%%%"}), 400, "invalid_base64", "goal.raw"),
    ("raw pixels as numbers", plan(goal={"raw": [0, 0, 0]}), 400, "invalid_type", "goal.raw"),
    ("raw and an image", plan(goal=raw_of(frame_at(9, 9)) | {"image": SEEN}), 400, "unknown_field",
     "goal.image"),
    ("empty object", plan(goal={}), 400, "invalid_object", "goal"),
    ("session of wrong type", plan(session=3), 400, "invalid_value", "session"),
    ("empty session", plan(session=""), 400, "invalid_value", "session"),
    ("session with a slash", plan(session="a/b"), 400, "invalid_value", "session"),
    ("long session", plan(session="a" * 129), 400, "invalid_value", "session"),
    ("session of two lines", plan(session="a\n"), 400, "invalid_value", "session"),
    ("no steps", plan(steps=0), 400, "invalid_value", "steps"),
    ("steps without end", plan(steps=10**30), 400, "invalid_value", "steps"),
    ("half a step", plan(steps=1.5), 400, "invalid_value", "steps"),
    ("steps as text", plan(steps="4"), 400, "invalid_value", "steps"),
    ("steps as bool", plan(steps=True), 400, "invalid_value", "steps"),
    ("no budget", plan(budget=0), 400, "invalid_value", "budget"),
    ("budget for no search", plan(budget=23), 400, "invalid_value", "budget"),
    ("a budget of 301 digits", plan(budget=10**300), 400, "invalid_value", "budget"),
    ("budget above the limit", plan(budget=1001), 400, "invalid_value", "budget"),
    ("unknown method", plan(method="dreaming"), 400, "invalid_value", "method"),
    ("negative caution", plan(caution=-1), 400, "invalid_value", "caution"),
    ("endless caution", b'{"observation": "x", "goal": "x", "caution": 1e999}', 400,
     "invalid_value", "caution"),
    ("too much caution", plan(caution=1e300), 400, "invalid_value", "caution"),
    ("three sides", plan(zones=[[0, 0, 1]]), 400, "invalid_value", "zones.0"),
    ("a zone inside out", plan(zones=[[0, 0, 1, 1], [5, 0, 1, 1]]), 400, "invalid_value",
     "zones.1"),
    ("a zone of text", plan(zones=[[0, 0, "1", 1]]), 400, "invalid_value", "zones.0.2"),
    ("a zone as wide as the sky", plan(zones=[[-1e300, 0, 1e300, 1]]), 400, "invalid_value",
     "zones.0.0"),
    ("too many zones", plan(zones=[[0, 0, 1, 1]] * 3), 400, "invalid_value", "zones"),
    ("unknown encoding", plan(encoding_format="int8"), 400, "invalid_value", "encoding_format"),
    ("huge body", b" " * 200_001, 413, "request_too_large", None),
]  # fmt: skip

PREDICTIONS: list[Case] = [
    ("no frames", without("frames", predict()), 400, "missing_field", "frames"),
    ("no actions", without("actions", predict()), 400, "missing_field", "actions"),
    ("empty frames", predict(frames=[]), 400, "invalid_value", "frames"),
    ("empty actions", predict(actions=[]), 400, "invalid_value", "actions"),
    ("bad first frame", predict(frames=["", SEEN]), 400, "empty", "frames[0]"),
    ("bad third frame", predict(frames=[SEEN, SEEN, "x y"]), 400, "invalid_base64", "frames[2]"),
    ("bad only frame", predict(frames="x y"), 400, "invalid_base64", "frames"),
    ("more frames than actions lead to", predict(frames=[SEEN] * 4), 400, "invalid_value",
     "frames"),
    ("bad goal", predict(goal=""), 400, "empty", "goal"),
    ("one action, not in a list", predict(actions=[1, 0]), 400, "invalid_value", "actions.0"),
    ("actions as base64", predict(actions=base64.b64encode(b"x").decode()), 400, "invalid_value",
     "actions"),
    ("too narrow", predict(actions=[[1, 0], [1]]), 400, "invalid_value", "actions.1"),
    ("too wide", predict(actions=[[1, 0, 0]]), 400, "invalid_value", "actions.0"),
    ("empty action", predict(actions=[[]]), 400, "invalid_value", "actions.0"),
    ("too long", predict(actions=[[1, 0], [1.2, 1.2]]), 400, "invalid_value", "actions.1"),
    ("endless", f'{{"frames": "{SEEN}", "actions": [[1e999, 0]]}}'.encode(), 400, "invalid_value",
     "actions.0.0"),
    ("no number", predict(actions=[[0, None]]), 400, "invalid_value", "actions.0.1"),
    ("a number of text", predict(actions=[["1", 0]]), 400, "invalid_value", "actions.0.0"),
    ("a truth", predict(actions=[[True, 0]]), 400, "invalid_value", "actions.0.0"),
    ("too many", predict(actions=[[0, 0]] * 9), 400, "invalid_value", "actions"),
    ("session of a plan", predict(session="a"), 400, "unknown_field", "session"),
]  # fmt: skip

LIMITS: dict[str, Any] = {
    "max_image_bytes": 20_000,
    "max_pixels": 100_000,
    "max_budget": 1000,
    "max_steps": 8,
    "max_zones": 2,
    "max_request_bytes": 200_000,
}
"""Settings of the server that refuses these."""
