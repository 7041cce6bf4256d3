"""Requests to `/v1/embeddings` that must be refused, each with status, code and parameter."""

from __future__ import annotations

import os
from typing import Any

from helpers.serve.embeddings import WIDTH, base64_of, bomb, data_uri, encoded, picture

PNG = encoded(picture(0))
URI = data_uri(PNG)
JPEG = encoded(picture(0), "JPEG")
DEEP = "[" * 5_000 + "]" * 5_000
NOISE = os.urandom(70_000)

# (name, body or raw bytes, status, code, param)
MALFORMED: list[tuple[str, Any, int, str, str | None]] = [
    ("no body", b"", 400, "invalid_json", None),
    ("not JSON", b"{input:", 400, "invalid_json", None),
    ("not UTF-8", b'{"input": "\xff\xfe"}', 400, "invalid_json", None),
    ("NaN", b'{"input": "x", "dimensions": NaN}', 400, "invalid_json", None),
    ("Infinity", b'{"input": "x", "dimensions": -Infinity}', 400, "invalid_json", None),
    ("deep nesting", f'{{"input": {DEEP}}}'.encode(), 400, "invalid_json", None),
    ("a JSON list", [URI], 400, "invalid_type", None),
    ("no input", {"model": "tiny"}, 400, "missing_field", "input"),
    ("misspelt field", {"input": URI, "dimension": 3}, 400, "unknown_field", "dimension"),
    ("misspelt input", {"inputs": URI}, 400, "unknown_field", "inputs"),
    ("unknown model", {"input": URI, "model": "clip"}, 404, "model_not_found", "model"),
    ("model of wrong type", {"input": URI, "model": 3}, 400, "invalid_value", "model"),
    ("unknown encoding", {"input": URI, "encoding_format": "int8"}, 400, "invalid_value",
     "encoding_format"),
    ("zero dimensions", {"input": URI, "dimensions": 0}, 400, "invalid_value", "dimensions"),
    ("negative dimensions", {"input": URI, "dimensions": -1}, 400, "invalid_value", "dimensions"),
    ("too many dimensions", {"input": URI, "dimensions": WIDTH + 1}, 400, "invalid_value",
     "dimensions"),
    ("dimensions as text", {"input": URI, "dimensions": "8"}, 400, "invalid_value", "dimensions"),
    ("dimensions as float", {"input": URI, "dimensions": 8.5}, 400, "invalid_value", "dimensions"),
    ("dimensions as bool", {"input": URI, "dimensions": True}, 400, "invalid_value", "dimensions"),
    ("unknown pooling", {"input": URI, "pooling": "cls"}, 400, "invalid_value", "pooling"),
    ("normalize as text", {"input": URI, "normalize": "yes"}, 400, "invalid_value", "normalize"),
    ("other modality", {"input": URI, "modality": "text"}, 400, "unsupported_modality", "modality"),
    ("empty list", {"input": []}, 400, "empty_input", "input"),
    ("empty string", {"input": ""}, 400, "empty", "input"),
    ("null", {"input": None}, 400, "invalid_type", "input"),
    ("null in a list", {"input": [URI, None]}, 400, "invalid_type", "input[1]"),
    ("a number", {"input": 1.5}, 400, "invalid_type", "input"),
    ("token ids", {"input": [1, 2]}, 400, "unsupported_modality", "input[0]"),
    ("token id lists", {"input": [[1, 2]]}, 400, "unsupported_modality", "input[0]"),
    ("too many items", {"input": [URI] * 5}, 400, "too_many_items", "input"),
    ("plain text", {"input": "a photo of a cat"}, 400, "invalid_base64", "input"),
    ("bad padding", {"input": [URI, URI[:-1]]}, 400, "invalid_base64", "input[1]"),
    ("not an image", {"input": base64_of(b"hello")}, 400, "not_an_image", "input"),
    ("data URI without base64", {"input": "data:image/png,abc"}, 400, "invalid_data_uri", "input"),
    ("data URI of text", {"input": data_uri(b"x", "text/html")}, 400, "unsupported_media_type",
     "input"),
    ("zero-byte image", {"input": "data:image/png;base64,"}, 400, "empty", "input"),
    ("truncated JPEG", {"input": data_uri(JPEG[:-300])}, 400, "truncated", "input"),
    ("truncated PNG", {"input": [URI, data_uri(PNG[:200])]}, 400, "truncated", "input[1]"),
    ("bomb", {"input": data_uri(bomb())}, 400, "too_many_pixels", "input"),
    ("too many pixels", {"input": data_uri(encoded(picture(0, (2000, 1001)).quantize(2)))}, 400,
     "too_many_pixels", "input"),
    ("too many bytes", {"input": base64_of(NOISE)}, 413, "image_too_large", "input"),
    ("video that is none", {"input": [{"video": "AAAA"}]}, 400, "not_a_video", "input[0].video"),
    ("audio", {"input": [{"audio": "AAAA"}]}, 400, "unsupported_modality", "input[0]"),
    ("text object", {"input": {"text": "cat"}}, 400, "unsupported_modality", "input"),
    ("empty object", {"input": {}}, 400, "invalid_object", "input"),
    ("two images in one", {"input": {"image": URI, "url": URI}}, 400, "invalid_object", "input"),
    ("stray key", {"input": {"image": URI, "crop": 1}}, 400, "unknown_field", "input.crop"),
    ("image of wrong type", {"input": {"image": 5}}, 400, "invalid_type", "input.image"),
    ("part without url", {"input": [{"image_url": {}}]}, 400, "invalid_type",
     "input[0].image_url.url"),
    ("two parts", {"input": {"content": [{"image": URI}] * 2}}, 400, "invalid_content",
     "input.content"),
    ("nested content", {"input": {"content": [{"content": []}]}}, 400, "invalid_content",
     "input.content[0]"),
    ("text part", {"input": {"content": [{"type": "text", "text": "x"}]}}, 400,
     "unsupported_modality", "input.content[0]"),
    ("unlisted host", {"input": "https://example.com/a.png"}, 400, "url_not_allowed", "input"),
    ("metadata host", {"input": "http://169.254.169.254/latest"}, 400, "url_not_allowed", "input"),
    ("listed, private", {"input": {"url": "http://localhost/x"}}, 400, "url_not_allowed",
     "input.url"),
    ("file URL", {"input": "file:///etc/passwd"}, 400, "invalid_url", "input"),
    ("URL with password", {"input": "http://a:b@localhost/x"}, 400, "invalid_url", "input"),
    ("redirect out", {"input": "IMAGES/redirect?http://localhost:1/x"}, 400, "url_not_allowed",
     "input"),
    ("redirect loop", {"input": "IMAGES/loop"}, 400, "fetch_failed", "input"),
    ("fetched 404", {"input": "IMAGES/missing"}, 400, "fetch_failed", "input"),
    ("fetched text", {"input": "IMAGES/text"}, 400, "not_an_image", "input"),
    ("fetched too much", {"input": "IMAGES/endless"}, 413, "image_too_large", "input"),
    ("huge body", b" " * 300_001, 413, "request_too_large", None),
]  # fmt: skip
