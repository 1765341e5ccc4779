"""The coordinator process: sockets on one side, `Coordinator.tick` on the other."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from gate.contract import vocabulary_hash
from server.allocation import keep_freed_memory
from server.config import Config
from server.coordinator.arrays import Float32, Int32
from server.coordinator.coordinator import Coordinator
from server.coordinator.fuser import Fuser
from server.coordinator.gate_runner import GateRunner, load_gate
from server.coordinator.links import ExpertLink, ExpertLinks, LinkState
from server.coordinator.observer import Observer
from server.coordinator.snapshot import snapshot
from server.coordinator.table import SequenceTable
from server.coordinator.warmup import warm_up
from server.errors import StartError, UnreachableError
from server.logs import fields
from server.remote.agreement import list_length
from server.remote.dialer import dialers
from server.wire.api import (
    API_SOCKET,
    Abort,
    BareTimes,
    FromApi,
    GateLoaded,
    GetStats,
    LoadGate,
    RunBare,
    Status,
    Submit,
    ToApi,
)
from server.wire.base import Stop
from server.wire.channel import Channel, Selector, endpoint
from server.wire.expert import FromExpert, Ready, Refused, Scored
from server.wire.supervisor import (
    CONTROL_SOCKET,
    CoordinatorReady,
    Drain,
    Drained,
    ExpertDown,
    ExpertUp,
    FromSupervisor,
    RemoteNote,
    RestartExpert,
    ToSupervisor,
)

_IDLE_SECONDS = 1.0
_DIAL_SECONDS = 0.1
"""How often is looked whether a worker on another host was reached."""
_log = logging.getLogger("polylogit.coordinator")


def run(config: Config, directory: Path) -> None:
    """Entry of the coordinator process; returns when the supervisor says `Stop`. Raises StartError."""
    import torch

    torch.set_num_threads(1)
    keep_freed_memory()
    CoordinatorProcess(config, directory).run()


class CoordinatorProcess:
    """Waits for the experts, builds the coordinator over what they are, then ticks."""

    def __init__(self, config: Config, directory: Path) -> None:
        self._config = config
        self._directory = directory
        self._selector = Selector()
        self._api: Channel[FromApi, ToApi] = Channel(endpoint(directory, API_SOCKET), FromApi, bind=True)
        self._control: Channel[FromSupervisor, ToSupervisor] = Channel(
            endpoint(directory, CONTROL_SOCKET), FromSupervisor, bind=True
        )
        self._selector.register(self._control, self._on_control)
        self._experts = ExpertLinks(
            config.expert_names,
            self._selector,
            self._on_expert,
            self._on_lost,
            dialers(config),
            config.limits.sequences,
        )
        self._notes: dict[int, str] = {}
        self._observer = Observer(len(config.experts))
        self._coordinator: Coordinator | None = None
        self._gate: GateRunner | None = None
        self._fuser: Fuser | None = None
        self._status: Status | None = None
        self._drain_until: float | None = None
        self._stopped = False

    def run(self) -> None:
        warm_up()
        while not self._stopped and not all(link.up for link in self._experts.links):
            self._experts.dispatch(self._reach())
        if not self._stopped:
            self._serve()
        self._api.send(Stop())
        self._experts.stop()
        self._api.close()
        self._control.close()

    def _serve(self) -> None:
        """Tick until stopped."""
        coordinator = self._coordinator = self._build()
        self._selector.register(self._api, self._on_api)
        self._control.send(CoordinatorReady())
        self._send_status()
        while not self._stopped:
            idle_seconds = self._reach()
            if self._experts.stepping():
                self._await_reports()
            else:
                self._experts.dispatch(idle_seconds)
            self._watch_starts()
            coordinator.tick()
            self._give_up_silent()
            self._watch_drain(coordinator)
            self._send_outbox(coordinator)

    def _await_reports(self) -> None:
        """The barrier. An engine that does not report in time is given up."""
        limit = self._config.limits.tick_seconds
        for link in self._experts.collect(limit):
            self._give_up(link, f"no answer for {limit:g} s")

    def _give_up_silent(self) -> None:
        """An engine that did not show the rows that were asked for has ended, or hangs."""
        for link in self._experts.links:
            if link.silent:
                self._give_up(link, "no answer when asked for rows")

    # --- what arrives ---

    def _on_control(self, message: FromSupervisor) -> None:
        match message:
            case ExpertUp(expert=expert, generation=generation):
                self._experts.open(expert, self._directory, generation)
                self._send_status()
            case ExpertDown(expert=expert, generation=generation):
                self._lose(self._experts.links[expert], generation)
            case Drain(grace_seconds=grace):
                self._start_drain(grace)
            case Stop():
                self._stopped = True

    def _on_api(self, message: FromApi) -> None:
        if (coordinator := self._coordinator) is None:
            return
        match message:
            case Submit(sequences=sequences):
                coordinator.sequences.submit(sequences)
                self._send_outbox(coordinator)  # a refusal does not wait for the engines' step
            case Abort(sequences=sequences):
                coordinator.sequences.abort(sequences)
            case GetStats():
                self._api.send(snapshot(self._observer, coordinator, self._experts.links))
            case LoadGate(path=path):
                self._api.send(GateLoaded(self._replace_gate(Path(path))))
            case RunBare(experts=experts, bare=bare):
                self._api.send(BareTimes(self._experts.bare(experts, bare, self._config.limits.start_seconds)))

    def _on_expert(self, link: ExpertLink, message: FromExpert) -> None:
        if isinstance(message, Ready):
            if self._coordinator is not None:
                self._coordinator.sequences.refit()
            self._send_status()
        elif isinstance(message, Scored) and self._coordinator is not None:
            self._coordinator.sequences.note_scores(link, message)
        elif isinstance(message, Refused) and self._coordinator is not None:
            self._coordinator.sequences.refuse(message)

    # --- experts come and go --------------------------------------------------------------------------------------

    def _lose(self, link: ExpertLink, generation: int) -> None:
        if generation != link.generation or link.state is LinkState.DOWN:
            return
        self._experts.close(link.index)
        if self._coordinator is not None:
            self._coordinator.sequences.lose_expert(link)
        self._send_status()

    def _give_up(self, link: ExpertLink, message: str) -> None:
        """An expert hangs: have its process replaced, or on another host connect to it again."""
        if link.dialer is None:
            self._control.send(RestartExpert(link.index, link.generation, message))
        else:
            self._note(link, message)
        self._lose(link, link.generation)

    def _on_lost(self, link: ExpertLink) -> None:
        self._give_up(link, "the connection was lost")

    def _reach(self) -> float:
        """Take up new connections to experts on other hosts; the seconds until it is time to look again."""
        for link in self._experts.remote:
            try:
                if self._experts.reach(link):
                    self._note(link, "")
            except UnreachableError as error:
                if error.final and self._coordinator is None:
                    raise StartError(f"expert {link.name}: {error}") from None
                self._note(link, str(error))
        return _DIAL_SECONDS if any(link.channel is None for link in self._experts.remote) else _IDLE_SECONDS

    def _note(self, link: ExpertLink, message: str) -> None:
        """Tell the supervisor what changed about an expert on another host."""
        if self._notes.get(link.index) != message:
            self._notes[link.index] = message
            self._control.send(RemoteNote(link.index, message))

    def _watch_starts(self) -> None:
        """A restarted expert must be ready within the time limit."""
        for link in self._experts.links:
            waited = time.perf_counter() - link.ticked_at
            if link.state is LinkState.STARTING and waited > self._config.limits.start_seconds:
                self._give_up(link, f"not ready after {self._config.limits.start_seconds:g} s")

    def _send_outbox(self, coordinator: Coordinator) -> None:
        for message in coordinator.sequences.outbox:
            self._api.send(message)
        coordinator.sequences.outbox.clear()

    def _send_status(self) -> None:
        """Tell the api what changed."""
        if (coordinator := self._coordinator) is None:
            return
        states = {link.name: link.state.value for link in self._experts.links}
        enough = any if self._config.on_expert_loss == "degrade" else all
        ready = enough(link.up for link in self._experts.links) and not coordinator.sequences.draining
        status = Status(ready, coordinator.sequences.draining, states)
        if status != self._status:
            self._status = status
            self._api.send(status)
            _log.info("status", extra=fields(ready=ready, draining=coordinator.sequences.draining, experts=states))

    # --- shutdown -------------------------------------------------------------------------------------------------

    def _start_drain(self, grace_seconds: float) -> None:
        self._drain_until = time.monotonic() + grace_seconds
        if self._coordinator is None:
            self._control.send(Drained())
        else:
            self._coordinator.sequences.draining = True
            self._send_status()

    def _watch_drain(self, coordinator: Coordinator) -> None:
        if self._drain_until is None:
            return
        if time.monotonic() > self._drain_until:
            coordinator.sequences.fail_all("the server is shutting down")
        if coordinator.sequences.idle:
            self._drain_until = None
            self._control.send(Drained())

    # --- construction ---------------------------------------------------------------------------------------------

    def _build(self) -> Coordinator:
        """The coordinator, once every expert has said what it is. Raises StartError if they do not fit together."""
        config = self._config
        infos = [link.info for link in self._experts.links if link.info is not None]
        vocabularies = {info.vocab_size for info in infos}
        if len(vocabularies) != 1:
            sizes = ", ".join(
                f"{name}: {info.vocab_size}" for name, info in zip(config.expert_names, infos, strict=True)
            )
            raise StartError(f"the experts' vocabularies differ in size ({sizes})")
        vocabulary = vocabularies.pop()
        gate = None if config.gate is None else self._load_gate(config.path(config.gate.file), config.gate.sha256)
        table = SequenceTable(
            slots=config.limits.sequences,
            experts=len(infos),
            top_k=min(list_length(config), vocabulary),
            projected=gate.projected_size if gate else 0,
            state=gate.state_size if gate else 0,
            vocabulary=vocabulary,
        )
        fuser = Fuser(config.expert_names, vocabulary, gate, self._whole_rows, self._observer.clock)
        self._gate, self._fuser = gate, fuser
        return Coordinator(config, self._experts.links, fuser, table, self._observer)

    def _whole_rows(self, wanted: dict[int, Int32]) -> dict[int, Float32]:
        """What `Fuser` is given to ask the experts by."""
        found = self._experts.whole_rows(wanted, self._config.limits.tick_seconds)
        for expert, rows in found.items():
            self._observer.fetched(expert, *rows.shape)
        return found

    def _load_gate(self, path: Path, sha256: str | None = None) -> GateRunner:
        """The checkpoint at `path`. Raises StartError if it does not fit the deployment."""
        config = self._config
        infos = [link.info for link in self._experts.links if link.info is not None]
        return load_gate(
            path,
            sha256=sha256,
            experts=config.expert_names,
            vocabulary_hash=vocabulary_hash(config.path(config.experts[0].model) / "tokenizer.json"),
            vocabulary_size=infos[0].vocab_size,
            hidden_sizes=[info.hidden_size for info in infos],
        )

    def _replace_gate(self, path: Path) -> str:
        """Go on with another gate; why not, or nothing."""
        if self._gate is None or self._fuser is None:
            return "the deployment runs without a gate"
        try:
            gate = self._load_gate(path)
        except StartError as error:
            return str(error)
        if gate.top_k > (listed := list_length(self._config)):
            return f"gate {path.name}: top_k is {gate.top_k}, experts list {listed} log-probabilities"
        for field in ("projected_size", "state_size"):
            old, new = getattr(self._gate, field), getattr(gate, field)
            if old != new:
                return f"gate {path.name}: {field} is {new}, the loaded gate's is {old}"
        self._gate = gate
        self._fuser.replace_gate(gate)
        return ""
