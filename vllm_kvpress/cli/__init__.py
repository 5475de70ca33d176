"""The command `vllm-kvpress`: what policies there are, whether a file is right, what one will do.

Needs no vLLM and no GPU, but for `eval`, which starts engines, and `calibrate-heads`, which needs
transformers. Exit code 0, or 2 with one line on stderr.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from vllm_kvpress import __version__
from vllm_kvpress.cli.calibrate import add_command as add_calibrate
from vllm_kvpress.cli.evaluate import add_commands
from vllm_kvpress.errors import ConfigError, KVPressError

__all__ = ["main"]

_MAX_TOKENS = 2**31 - 1


class _Parser(argparse.ArgumentParser):
    """Raises what argparse would print, so that every error is reported alike."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message, fix=f"See {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code.

    Args:
        argv: the words after `vllm-kvpress`; those after `--` are options of vLLM.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    cut = words.index("--") if "--" in words else len(words)
    try:
        arguments = _parser().parse_args(words[:cut])
        arguments.vllm_options = words[cut + 1 :]
        arguments.run(arguments)
    except KVPressError as error:
        print(f"vllm-kvpress: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our output, such as `head`, has seen enough
        sys.stderr.close()
        return 0
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="vllm-kvpress", description="KV-cache policies for vLLM.")
    parser.add_argument("--version", action="version", version=f"vllm-kvpress {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)

    policies = commands.add_parser("policies", help="list the policies, a line each")
    policies.set_defaults(run=_run_policies)

    check = commands.add_parser("check", help="check a policy and print it in full")
    check.add_argument("policy", help="FILE.yaml, a name, or inline JSON")
    check.set_defaults(run=_run_check)

    explain = commands.add_parser(
        "explain",
        help="what a policy keeps and frees on a model, in numbers",
        epilog="Options of vLLM may follow after --; those that a policy refuses are reported.",
    )
    explain.add_argument("policy", help="a name, FILE.yaml, or inline JSON")
    explain.add_argument(
        "--model", required=True, help="a model's folder, a name in the Hugging Face cache, testbed"
    )
    for option, meaning in (
        ("--max-model-len", "the longest sequence (default: the model's own)"),
        ("--prompt-tokens", "the prompt to compute for (default: half of --max-model-len)"),
        ("--output-tokens", "tokens generated after it (default: 256)"),
        ("--block-size", "tokens in a block (default: 16, vLLM's on CUDA)"),
    ):
        explain.add_argument(option, type=_tokens, metavar="N", help=meaning)
    explain.set_defaults(run=_run_explain)

    add_calibrate(commands)
    add_commands(commands)
    return parser


def _tokens(text: str) -> int:
    if not (
        text.isascii() and text.isdigit() and len(text) <= 10 and 1 <= int(text) <= _MAX_TOKENS
    ):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not an integer from 1 to {_MAX_TOKENS}")
    return int(text)


def _run_policies(_: argparse.Namespace) -> None:
    from vllm_kvpress.config import known_policies

    infos = known_policies()
    width = max(len(info.name) for info in infos)
    for info in infos:
        print(f"{info.name:{width}}  {info.title} [{info.paper}]")


def _run_check(arguments: argparse.Namespace) -> None:
    import yaml

    from vllm_kvpress.config import load_policy
    from vllm_kvpress.policies import resolve
    from vllm_kvpress.policies.heads import check_heads

    policy = load_policy(arguments.policy)
    scorer = resolve(policy)
    check_heads(policy.heads)
    print(yaml.safe_dump(policy.to_json(), sort_keys=False), end="")
    print(f"# {arguments.policy} is a valid policy; its scorer: {scorer}")


def _run_explain(arguments: argparse.Namespace) -> None:
    from vllm_kvpress.cli.explain import explain

    explain(
        arguments.policy,
        arguments.model,
        max_model_len=arguments.max_model_len,
        prompt_tokens=arguments.prompt_tokens,
        output_tokens=arguments.output_tokens,
        block_size=arguments.block_size,
        vllm_words=arguments.vllm_options,
    )
