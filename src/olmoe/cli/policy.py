"""Make a router policy from an analysis: force the experts of one domain, to see how that changes any text.

METRICS is metrics.json of `olmoe analyze`, or its folder. The policy is JSON for --router-policy of generate, chat,
serve and batch, and for `router_policy` in Python and in requests.
"""

from __future__ import annotations

import argparse


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `olmoe policy`."""
    parser.add_argument("metrics", metavar="METRICS", help="metrics.json of olmoe analyze, or the folder it is in")
    parser.add_argument("--domain", required=True, metavar="NAME", help="whose experts: a domain in METRICS")
    parser.add_argument(
        "--how",
        choices=("only", "boost", "pin"),
        default="only",
        help="allow: choose no others; boost: add to their logits; pin: every token chooses them (%(default)s)",
    )
    parser.add_argument(
        "--experts",
        type=int,
        metavar="N",
        help="N experts in each layer (default: those with more than an even share; with pin, half of top-k)",
    )
    parser.add_argument(
        "--by",
        choices=("share", "contrast"),
        default="share",
        help="rank experts by their share of the domain's tokens, or by that minus their share of all (%(default)s)",
    )
    parser.add_argument(
        "--strength", type=float, default=2.0, metavar="X", help="with boost: what is added to logits (%(default)s)"
    )
    parser.add_argument("-o", "--output", metavar="FILE", help="the file to write (default: stdout)")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE")


def run(arguments: argparse.Namespace) -> int:
    """Read, choose, write."""
    from olmoe.analysis.domain_policy import domain_policy
    from olmoe.io import targets
    from olmoe.runner.policy_file import to_text, write_policy

    if arguments.output is not None:
        targets.check_file(arguments.output, overwrite=arguments.overwrite, option="--output")
    policy = domain_policy(
        arguments.metrics,
        arguments.domain,
        how=arguments.how,
        experts=arguments.experts,
        by=arguments.by,
        strength=arguments.strength,
    )
    if arguments.output is None:
        print(to_text(policy), end="")
    else:
        write_policy(arguments.output, policy)
    return 0
