"""Running a chat template that came with a model: no Python objects, and limits on work and size.

Jinja's sandbox keeps a template from Python's internals but not from filling the memory. So text grows
only through operations that are counted here, loops and calls are counted, and of filters, globals and
text methods only those that chat templates use exist.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import jinja2
from jinja2 import nodes
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.visitor import NodeTransformer

from openmimo.errors import TextError

MAX_WORK = 20_000_000
MAX_TEMPLATE_CHARACTERS = 1_000_000
# fmt: off
FILTERS = (
    "abs", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float", "int", "items",
    "last", "length", "list", "lower", "map", "max", "min", "reject", "rejectattr", "reverse", "safe", "select",
    "selectattr", "sort", "string", "title", "trim", "unique", "upper",
)
TEXT_METHODS = (
    "capitalize", "count", "endswith", "find", "isalpha", "isdigit", "isspace", "lower", "lstrip", "removeprefix",
    "removesuffix", "replace", "rsplit", "rstrip", "split", "splitlines", "startswith", "strip", "title", "upper",
)
# fmt: on
MAX_NUMBER_BITS = 1024
# Units for one call, and for one round of a loop or one entry of a list: about their time in characters.
CALL_UNITS = 2000
ENTRY_UNITS = 100


class _CountWork(NodeTransformer):
    """Sends loops and text joining (`~`), which the sandbox does not intercept, through counted filters."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = nodes.Filter(node.iter, "counted_loop", [], [], None, None, lineno=node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        parts = nodes.List(node.nodes, lineno=node.lineno)
        return nodes.Filter(parts, "counted_join", [], [], None, None, lineno=node.lineno)


class GuardedEnvironment(ImmutableSandboxedEnvironment):
    """A sandbox that gives one rendering `max_work` units: characters made, loop rounds, calls."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self, *, max_work: int = MAX_WORK) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,
            finalize=self._measured,
            extensions=["jinja2.ext.loopcontrols"],
        )
        self._max_work = max_work
        self._left = max_work
        self.filters = {name: self._counted(self.filters[name]) for name in FILTERS}
        self.filters |= {"counted_loop": self._loop, "counted_join": self._join, "join": self._join}
        self.filters |= {"replace": self._replace, "tojson": json.dumps}
        self.globals = {"range": self.globals["range"], "namespace": jinja2.utils.Namespace, "raise_exception": _refuse}

    def compile_template(self, source: str) -> jinja2.Template:
        """The template with its work counted. Raises: TextError for a syntax error."""
        if len(source) > MAX_TEMPLATE_CHARACTERS:
            raise TextError(f"chat template of {len(source)} characters; expected at most {MAX_TEMPLATE_CHARACTERS}")
        try:
            tree = _CountWork().visit(self.parse(source))
            return jinja2.Template.from_code(self, cast(Any, self.compile(tree)), self.make_globals(None))
        except (jinja2.TemplateError, RecursionError, SyntaxError) as error:
            raise TextError(f"the chat template cannot be used: {error}; correct its Jinja syntax") from error

    def run(
        self,
        template: jinja2.Template,
        variables: Mapping[str, Any],
        *,
        to_json: Callable[..., str],
        extra_work: int = 0,
    ) -> str:
        """The template's output; `to_json` becomes its `tojson` filter. Not for two threads at once.

        Raises: TextError for whatever goes wrong in the template, or for too much work.
        """
        self._left = self._max_work + extra_work
        self.filters["tojson"] = self._counted(to_json)
        try:
            return "".join(template.generate(variables))
        except TextError:
            raise
        except (jinja2.TemplateError, *_TEMPLATE_FAULTS) as error:
            raise TextError(f"the chat template fails: {type(error).__name__}: {error}") from error

    def spend(self, units: int) -> None:
        """Count work. Raises: TextError when the allowance is used up."""
        self._left -= units
        if self._left < 0:
            raise TextError("the chat template does too much work or makes too much text; shorten it or the messages")

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str):
            return attr in TEXT_METHODS
        return not isinstance(obj, int | float) and super().is_safe_attribute(obj, attr, value)

    def unsafe_undefined(self, obj: Any, attribute: str) -> jinja2.Undefined:
        # Jinja's own would print as nothing.
        raise SecurityError(f"{attribute!r} of {type(obj).__name__} is not for templates")

    def wrap_str_format(self, value: Any) -> None:
        return None  # `format` is not among TEXT_METHODS

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        __self.spend(CALL_UNITS)
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str):
            __self._measured(owner)
            if getattr(__obj, "__name__", "") == "replace":
                return __self._replace(owner, *args, **kwargs)
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if isinstance(left, int | float) and isinstance(right, int | float):
            bits = max(int(abs(left)).bit_length(), 1) * (int(abs(right)) if operator == "**" else 1)
            if bits > MAX_NUMBER_BITS:
                raise TextError("the chat template computes with very long numbers; remove that")
        elif operator == "+":
            self._measured([left, right])
        elif operator == "*":
            self.spend(_repeated(left, right))
        else:
            raise TextError(f"the chat template uses {operator!r} on text; only + and ~ can be used")
        return super().call_binop(context, operator, left, right)

    def _measured(self, value: Any) -> Any:
        """`value`, after spending one unit for each character and entry in it."""
        pending = [value]
        while pending:
            item = pending.pop()
            self.spend(len(item) if isinstance(item, str) else ENTRY_UNITS)
            if isinstance(item, dict):
                pending += [part for pair in cast(dict[Any, Any], item).items() for part in pair]
            elif isinstance(item, list | tuple):
                pending += cast(list[Any], item)
        return value

    def _counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        takes_context = hasattr(function, "jinja_pass_arg")

        @functools.wraps(function)
        def counted(*args: Any, **kwargs: Any) -> Any:
            self._measured(list(args[1:] if takes_context else args))
            return function(*args, **kwargs)

        return counted

    def _loop(self, items: Iterable[Any]) -> list[Any]:
        rounds = list(items)
        self.spend(ENTRY_UNITS * (1 + len(rounds)))
        return rounds

    def _join(self, parts: Iterable[Any], d: str = "") -> str:
        listed = list(parts)
        self._measured(listed)
        self.spend(len(d) * len(listed))
        return str(d).join(map(str, listed))

    def _replace(self, text: Any, old: str, new: str, count: int = -1) -> str:
        self._measured([text, old, new])
        text = text if isinstance(text, str) else str(text)
        self.spend(text.count(old) * len(new))
        return text.replace(old, new, count)


_TEMPLATE_FAULTS = (
    TypeError,
    ValueError,
    AttributeError,
    LookupError,
    ArithmeticError,
    AssertionError,
    RecursionError,
    MemoryError,
)


def _repeated(left: Any, right: Any) -> int:
    sequence, times = (right, left) if isinstance(left, int) else (left, right)
    return len(sequence) * max(times, 0)


def _refuse(message: object) -> None:
    raise TextError(f"the chat template refuses these messages: {message}")
