"""The PLM with demonstrations in its prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from pema.generation.config import GenerateConfig
from pema.generation.decoding import GeneratedTexts
from pema.methods.adapted.plain import Plain
from pema.methods.contract import Job
from pema.owner.contract import BATCH_TOKENS, PLM
from pema.tasks.demonstrations import DemonstrationTemplate
from pema.tasks.example import Example
from pema.tasks.selection import Selection
from pema.tasks.target_statistics import count_line_breaks, stop_after


class Prompted(Plain):
    """The PLM with k demonstrations in its prompts."""

    def __init__(self, plm: PLM, job: Job, selection: Selection, k: int, reserved: int) -> None:
        super().__init__(plm, job)
        self._k, self._selection = k, selection
        template = job.task.template.settled(plm.tokenizer)
        self._template = DemonstrationTemplate(
            template.text,
            template.chat,
            template.system,
            demonstrations=lambda source: selection.select(source, k),
            window=plm.description.max_length,
            reserved=reserved,
        )
        self._task = replace(job.task, template=self._template)
        self._stop = () if template.chat else stop_after(count_line_breaks(each.target for each in job.train))

    @property
    def disk_bytes(self) -> int:
        """Bytes of the texts that demonstrations are selected from."""
        stored = self._selection.stored(self._k)
        return sum(len(text.encode()) for example in stored for text in (example.source, example.target))

    @property
    def chosen(self) -> Mapping[str, Any]:
        """The number of demonstrations, and of prompts into which not all fitted so far."""
        return {"k": self._k, "shortened_prompts": sum(map(bool, self._template.shortened.values()))}

    def generate(self, sources: Sequence[str | Example], **settings: Any) -> GeneratedTexts:  # noqa: ANN401
        """See `AdaptedModel.generate`."""
        longest = max(len(each.prompt) for each in self._template.encode_prompts(self._plm.tokenizer, sources))
        settings = {**self._job.decoding, **settings}
        settings["stop"] = settings.get("stop") or self._stop  # a plain text would go on with a further example
        # The keys and values of long prompts take much memory.
        most = settings.get("batch_size", GenerateConfig.batch_size)
        settings["batch_size"] = min(most, max(1, BATCH_TOKENS // longest))
        return super().generate(sources, **settings)
