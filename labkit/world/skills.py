"""The table of skills: name → sampler. Its order is the order of every table in the course."""

from labkit.world import conversation, knowledge, language, procedures
from labkit.world.items import Sampler

SKILLS: dict[str, Sampler] = {
    "facts": knowledge.facts,
    "unknown": knowledge.unknown,
    "context": knowledge.context,
    "arithmetic": procedures.arithmetic,
    "compare": procedures.compare,
    "sort": procedures.sort,
    "reverse": procedures.reverse,
    "count": procedures.count,
    "tool": procedures.tool,
    "sentiment": language.sentiment,
    "intent": language.intent,
    "extract": language.extract,
    "translate": language.translate,
    "chat": conversation.chat,
    "system": conversation.system,
    "talk": conversation.talk_turns,
}
