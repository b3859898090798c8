"""Takes PromQL as a JSON array of texts, and gives for each the vectors that its comparisons compare.

An alert's expression is empty as long as all is well. What it compares must not be: a series that does not exist is never below or above anything.
"""

import json
import sys

import promql_parser

FILTERS = {"==", "!=", "<", ">", "<=", ">=", "and", "or", "unless"}


def compared(expression):
    if isinstance(expression, promql_parser.ParenExpr):
        return compared(expression.expr)
    if isinstance(expression, promql_parser.BinaryExpr) and str(expression.op) in FILTERS:
        return compared(expression.lhs) + compared(expression.rhs)
    return [expression.prettify()]


json.dump([compared(promql_parser.parse(text)) for text in json.load(sys.stdin)], sys.stdout)
