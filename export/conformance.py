"""Conformance: texts written for it, and what a bundle says of them, so that a port or another host can prove itself.

The texts are this project's own; none comes from a data set. What is recorded of them, and how ``arllm doctor``
compares it, lives in the runtime (:mod:`arllm.runtime.conformance`).
"""

from __future__ import annotations

_PARAGRAPH = (
    "A small workshop repairs clocks in the order in which they arrive, unless one of them belongs to the town, "
    "in which case it is repaired first. On Monday seven clocks arrive, two of them from the town hall; each "
    "repair takes forty minutes, and the workshop closes after six hours. "
)

TEXTS: tuple[str, ...] = (
    "",
    " ",
    "?",
    "Hello!",
    "What is 17 + 25?",
    "Compute 348 * 27 - 1009 and give the remainder of the result when divided by 13.",
    "not ( True and False ) or ( False and not True ) is",
    "Which planet is closest to the sun?",
    "List three causes of the French Revolution in one sentence each.",
    "def f(n):\n    return n if n < 2 else f(n - 1) + f(n - 2)\nprint(f(10))",
    "SELECT name, COUNT(*) FROM visits GROUP BY name HAVING COUNT(*) > 3;",
    "If all bloops are razzies and some razzies are lazzies, are some bloops lazzies?\n(A) Yes\n(B) No",
    "Today is the 28th of February 2023. What is the date in ten days, in MM/DD/YYYY?",
    "Sort these words alphabetically: walnut, cherry, almond, birch, maple, cedar",
    "A ball is thrown upward at 12 m/s. Ignoring air resistance, how high does it rise? (g = 9.81 m/s^2)",
    "Une phrase en français : quelle heure est-il à Montréal quand il est midi à Paris ?",
    "日本の首都はどこですか。",
    "Сколько будет семью восемь?",
    "🙂🙃 emoji, a NUL \x00 and a tab\tin one line",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    _PARAGRAPH + "How many clocks are repaired on Monday?",
    _PARAGRAPH * 4 + "At what minute does the repair of the third clock begin?",
    _PARAGRAPH * 12 + "Write a schedule as a table.",
    _PARAGRAPH * 60 + "Summarise the text above in one sentence.",
)
