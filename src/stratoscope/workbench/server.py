"""The agent's tools behind the Model Context Protocol; stdout belongs to the protocol alone."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable
from typing import Any

from mcp.server import MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp.types import ToolAnnotations

from stratoscope.errors import StratoscopeError
from stratoscope.workbench.agent import Agent
from stratoscope.workbench.skill import RULES

READS = ToolAnnotations(readOnlyHint=True, destructiveHint=False, openWorldHint=False)


def server(agent: Agent) -> MCPServer[Any]:
    """A server of every tool, not yet running."""
    import stratoscope

    made: MCPServer[Any] = MCPServer(
        "stratoscope", instructions=RULES, version=stratoscope.__version__, log_level="WARNING"
    )
    for tool in agent.tools:
        made.add_tool(told(tool), annotations=READS, structured_output=False)
    return made


def told(tool: Callable[..., str]) -> Callable[..., str]:
    """The same, a refusal as a sentence for the agent; what libraries print goes to stderr."""

    @functools.wraps(tool)
    def safe(**given: Any) -> str:
        try:
            with contextlib.redirect_stdout(sys.stderr):
                return tool(**given)
        except StratoscopeError as error:
            raise ToolError(str(error)) from error

    return safe
