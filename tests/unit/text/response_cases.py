"""Answers of models, good and bad, with what should be made of them."""

from __future__ import annotations

from typing import Any

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string"},
                    "days": {"type": "integer"},
                    "dry": {"type": "boolean"},
                    "tags": {"type": "array"},
                },
            },
        },
    },
    {"name": "stop"},
]


def block(*parameters: tuple[str, str], name: str = "weather") -> str:
    lines = "".join(f"<parameter={key}>{value}</parameter>\n" for key, value in parameters)
    return f"<tool_call>\n<function={name}>\n{lines}</function>\n</tool_call>"


CITY = block(("city", "Paris"))
PARIS = ("weather", {"city": "Paris"})
STOP = block(name="stop")
UNKNOWN = block(("a", "1"), name="rm")
UNCLOSED = "<tool_call>\n<function=weather>\n<parameter=city>Paris"

# text -> (reasoning, content, [(name, arguments), ...])
CASES: dict[str, tuple[str, str, list[tuple[str, dict[str, Any]]]]] = {
    "": ("", "", []),
    "Hello": ("", "Hello", []),
    "  Hello \n": ("", "  Hello \n", []),
    " \n ": ("", " \n ", []),
    "<think>a</think>b": ("a", "b", []),
    "\n<think>a</think>b": ("a", "b", []),
    "<think>\na\n</think>\n\nb\n": ("\na\n", "\n\nb\n", []),
    "<think></think>b": ("", "b", []),
    "<think></think>": ("", "", []),
    "<think></think>\n": ("", "", []),
    "<think></think><think>a</think>b": ("a", "b", []),
    "<think></think>\n\n<think>a</think>b": ("a", "b", []),
    "<think>a</think><think>b</think>c": ("ab", "c", []),
    "<think>open": ("open", "", []),
    "<think>open </thin": ("open </thin", "", []),
    "<think>a<think>b</think>c": ("a<think>b", "c", []),
    "<thin": ("", "<thin", []),
    "<thinker>": ("", "<thinker>", []),
    "a <think>b</think>": ("", "a <think>b</think>", []),
    "</think>b": ("", "</think>b", []),
    "<think>a</think>b</think>c": ("a", "b</think>c", []),
    "<think>a < b </ c</think>d": ("a < b </ c", "d", []),
    CITY: ("", "", [PARIS]),
    f"\n{CITY}\n": ("", "", [PARIS]),
    f"Wait.\n\n{CITY}": ("", "Wait.\n\n", [PARIS]),
    f"<think>a</think>{CITY}": ("a", "", [PARIS]),
    f"<think>a</think>\n\n{CITY}\n": ("a", "", [PARIS]),
    f"<think></think>ok{CITY}": ("", "ok", [PARIS]),
    CITY + CITY: ("", "", [PARIS, PARIS]),
    f"{CITY}\n{STOP}": ("", "", [PARIS, ("stop", {})]),
    f"{CITY}\nDone.": ("", "\nDone.", [PARIS]),
    f"{CITY} and {CITY}": ("", " and ", [PARIS, PARIS]),
    f"{CITY}<think>x</think>": ("", "<think>x</think>", [PARIS]),
    f"<think>a{CITY}": ("a", "", [PARIS]),
    f"<think>a{CITY}</think>b": ("a", "b", [PARIS]),
    f"<think>a{CITY}b</think>{STOP}": ("ab", "", [PARIS, ("stop", {})]),
    f"<think>say {UNCLOSED}</think>b": (f"say {UNCLOSED}", "b", []),
    f"<think>say {UNCLOSED}</think>{CITY}": (f"say {UNCLOSED}", "", [PARIS]),
    f"<think>say <tool_call></think>{CITY}": ("say <tool_call>", "", [PARIS]),
    f"<think>{UNKNOWN}</think>b": (UNKNOWN, "b", []),
    UNKNOWN: ("", UNKNOWN, []),
    f" {UNKNOWN} ": ("", f" {UNKNOWN} ", []),
    f"{UNKNOWN}{CITY}": ("", UNKNOWN, [PARIS]),
    block(("a", CITY), name="rm"): ("", block(("a", CITY), name="rm"), []),
    UNCLOSED: ("", UNCLOSED, []),
    f"{UNCLOSED}</parameter>": ("", f"{UNCLOSED}</parameter>", []),
    CITY.removesuffix("</tool_call>"): ("", "", [PARIS]),
    CITY.removesuffix("_call>"): ("", "", [PARIS]),
    CITY.removesuffix("\n</tool_call>") + " then": ("", CITY.removesuffix("\n</tool_call>") + " then", []),
    "<tool_call>": ("", "<tool_call>", []),
    "<tool_call>x": ("", "<tool_call>x", []),
    f"<tool_call>{CITY}": ("", "<tool_call>", [PARIS]),
    "<tool_call>\n<function=>": ("", "<tool_call>\n<function=>", []),
    f"<tool_call>\n<function={'x' * 300}>": ("", f"<tool_call>\n<function={'x' * 300}>", []),
    '<tool_call>\n{"name": "weather"}\n</tool_call>': ("", '<tool_call>\n{"name": "weather"}\n</tool_call>', []),
    "<tool_call><function=weather><parameter=city>Paris</parameter></function></tool_call>": ("", "", [PARIS]),
    block(("city", "a\n b ")): ("", "", [("weather", {"city": "a\n b "})]),
    block(("city", "&lt;b&gt; \"q\" \\n")): ("", "", [("weather", {"city": "&lt;b&gt; \"q\" \\n"})]),
    block(("city", "</think><think>")): ("", "", [("weather", {"city": "</think><think>"})]),
    block(("city", "x</parameter>y")): ("", "", [("weather", {"city": "x</parameter>y"})]),
    block(("city", "</tool_call>")): ("", "", [("weather", {"city": "</tool_call>"})]),
    block(("city", "")): ("", "", [("weather", {"city": ""})]),
    block(("city", "a"), ("city", "b")): ("", "", [("weather", {"city": "b"})]),
    block(("days", "3"), ("dry", "true"), ("tags", "[1]"), ("more", "3")): (
        "", "", [("weather", {"days": 3, "dry": True, "tags": [1], "more": "3"})],
    ),
    block(("days", "soon"), ("dry", "maybe"), ("tags", "[1")): (
        "", "", [("weather", {"days": "soon", "dry": "maybe", "tags": "[1"})],
    ),
    "<tool_call <tool_call": ("", "<tool_call <tool_call", []),
    "\U0001f600<think>é": ("", "\U0001f600<think>é", []),
}  # fmt: skip

# With streamed arguments, text -> (content, [(name, JSON text, whether the call is complete), ...])
BROKEN: dict[str, tuple[str, list[tuple[str, str, bool]]]] = {
    UNCLOSED: ("", [("weather", '{"city": "Paris', False)]),
    f"{UNCLOSED}</parameter>": ("", [("weather", '{"city": "Paris', False)]),
    f"{UNCLOSED}</parameter>\n</func": ("", [("weather", '{"city": "Paris', False)]),
    f"{UNCLOSED}</parameter>\n<parameter=days>3": ("", [("weather", '{"city": "Paris"', False)]),
    f"{UNCLOSED}</parameter>\n<parameter=a<b>3": (
        "<parameter=a<b>3", [("weather", '{"city": "Paris"', False)],
    ),
    f"{UNCLOSED}</parameter>\n<parameter=a<b>{STOP}": (
        "<parameter=a<b>", [("weather", '{"city": "Paris"', False), ("stop", "{}", True)],
    ),
    CITY.removesuffix("\n</tool_call>") + " then": (" then", [("weather", '{"city": "Paris"}', True)]),
    "<tool_call>\n<function=weather>\n<par": ("<tool_call>\n<function=weather>\n<par", []),
    "<tool_call>\n<function=weather>\n<parameter=tags>[1, ": ("", [("weather", "", False)]),
    f"<think>say {UNCLOSED}</think>b": ("b", []),
}  # fmt: skip
