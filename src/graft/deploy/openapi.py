"""The server's interface as OpenAPI 3.1 describes it."""

from __future__ import annotations

from typing import Any

_PROBABILITY = {"type": "number", "minimum": 0, "maximum": 1}
_NAME = {"type": "string", "description": "the file's name as the client gave it"}
_TOP = {"type": "array", "minItems": 1, "items": {"$ref": "#/components/schemas/Probability"}}
_SEVERAL = {"type": "array", "items": {"type": "string", "format": "binary"}}


def _object(required: dict[str, Any], **optional: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "required": list(required),
        "properties": {**required, **optional},
        "additionalProperties": False,
    }


SCHEMAS: dict[str, Any] = {
    "Probability": _object({"class": {"type": "string"}, "probability": _PROBABILITY}),
    "Classified": {
        **_object({"name": _NAME, "class": {"type": "string"}, "probability": _PROBABILITY,
                   "top": _TOP}),
        "description": "classes that exclude each other: the most probable one, and the next",
    },
    "Labelled": {
        **_object({"name": _NAME, "labels": {"type": "array", "items": {"type": "string"}},
                   "top": _TOP}),
        "description": "labels that do not exclude each other: those above 0.5, and the first",
    },
    "Measured": _object({
        "name": _NAME,
        "numbers": {"type": "object", "additionalProperties": {"type": "number"}},
    }),
    "Unreadable": _object({"name": _NAME, "error": {"type": "string"}}),
    "Prediction": {
        "anyOf": [
            {"$ref": f"#/components/schemas/{name}"}
            for name in ("Classified", "Labelled", "Measured", "Unreadable")
        ]
    },
    "Predictions": _object({
        "predictions": {
            "type": "array",
            "description": "one for each image, in the order of the request",
            "items": {"$ref": "#/components/schemas/Prediction"},
        }
    }),
    "Error": _object(
        {"error": {"type": "string"}},
        predictions={"type": "array", "items": {"$ref": "#/components/schemas/Unreadable"}},
    ),
    "Health": _object({"status": {"const": "ready"}, "version": {"type": "string"}}),
    "Metadata": {
        "type": "object",
        "required": ["graft_version", "classes", "output_kind", "stored", "preprocessing",
                     "reading", "input_size", "provenance"],
        "properties": {
            "graft_version": {"type": "integer"},
            "classes": {"type": "array", "items": {"type": "string"}},
            "output_kind": {"enum": ["classes", "labels", "numbers"]},
            "provenance": {"type": "object"},
        },
    },
}  # fmt: skip


def _answer(description: str, schema: str, headers: dict[str, Any] | None = None) -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}}
    found: dict[str, Any] = {"description": description, "content": content}
    return {**found, "headers": headers} if headers else found


_RETRY = {"Retry-After": {"schema": {"type": "integer"}, "description": "seconds"}}
_ERRORS = {
    "400": _answer("no image could be read, or the form is broken", "Error"),
    "408": _answer("the request did not arrive in time", "Error"),
    "413": _answer("too large, or too many images", "Error"),
    "415": _answer("neither a form with files nor an image", "Error"),
    "500": _answer("the model failed", "Error"),
    "503": _answer("too many requests at once, or no answer in time", "Error", _RETRY),
}
_IMAGE = {"schema": {"type": "string", "format": "binary"}}
_BODY = {
    "required": True,
    "content": {
        "multipart/form-data": {"schema": {"type": "object", "properties": {"images": _SEVERAL}}},
        "image/*": _IMAGE,
        "application/octet-stream": _IMAGE,
    },
}


def openapi(version: str) -> dict[str, Any]:
    def reading(summary: str, schema: str) -> dict[str, Any]:
        return {"get": {"summary": summary, "responses": {"200": _answer(summary, schema)}}}

    page = {"description": "HTML", "content": {"text/html": {"schema": {"type": "string"}}}}
    predict = {
        "summary": "Predictions for one image or several",
        "requestBody": _BODY,
        "responses": {"200": _answer("some or all could be read", "Predictions"), **_ERRORS},
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "graft serve", "version": version},
        "paths": {
            "/": {"get": {"summary": "A page to try the model", "responses": {"200": page}}},
            "/predict": {"post": predict},
            "/health": reading("Whether it is ready", "Health"),
            "/metadata": reading("The model: classes, preprocessing, origin", "Metadata"),
        },
        "components": {"schemas": SCHEMAS},
    }
