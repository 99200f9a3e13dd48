"""The one message of the reference's refusals, in the style of the whole package."""

from __future__ import annotations


def refusal(
    function: str, argument: str, condition: str, got: object, context: str, advice: str
) -> str:
    """mxtrain::reference.<function>: <argument> must <condition>, got <value> (...). <advice>"""
    start = f"mxtrain::reference.{function}: {argument} must {condition}"
    return f"{start}, got {got} ({context}). {advice}"
