"""`push_to_hub=True` of the training arguments: pushes as hub_upload.py does, while a run goes on and at its end."""

import logging
import os
import shutil
from functools import partial
from pathlib import Path

from huggingface_hub import get_token
from huggingface_hub.errors import HfHubHTTPError
from transformers.trainer_utils import HubStrategy
from transformers.utils.hub import PushInProgress

from modeling_deepseek_r1.checkpoint_files import ADAPTER_PATTERNS, write_manifest
from recipes.hub_commit import (
    HTTPError,
    UploadError,
    check_private,
    commit_files,
    explain,
    holds_a_card_by_hand,
    hub_api,
    with_retries,
)
from recipes.hub_files import ADAPTER_CONFIG, CARD, check_no_secret, is_adapter, read_json, select_files
from recipes.hub_paths import public_results
from recipes.model_card import write_card

logger = logging.getLogger(__name__)

SMALL_FILE = 10_000_000  # bytes; larger ones are linked, not read, for a push in the background
RUN_FILES = ("config.yaml", "metrics.jsonl", "README.md")


def _card(run_folder, repo_id, folder=None):
    """Writes the card of a run whose weights are in `folder`, by default in the run folder."""
    folder = folder or run_folder
    base = read_json(Path(folder) / ADAPTER_CONFIG).get("base_model_name_or_path") if is_adapter(folder) else None
    if base is None:
        return write_card(run_folder, repo_id, model_folder=folder)
    if Path(base).is_dir():
        logger.warning("%s: adapter_config.json names the local folder %s as its base; others need its name on the Hub "
                       "(python hub_upload.py ... --base_model user/name)", folder, base)  # fmt: skip
    return write_card(
        run_folder, repo_id, adapter=True, base_folder=base, model_folder=folder,
        base_model=None if Path(base).is_dir() else base,
    )  # fmt: skip


class HubPushMixin:
    """Put before `transformers.Trainer` in the list of bases.

    Trainer pushes whole folders: the first checkpoints without the model's code, training_args.bin (a pickle) and
    whatever else lies there. Here a push is one commit of the files that `select_files` names, made in the background
    while training goes on; `save_model` alone does not push, the recipes do (`push_results`) when eval.json is written.
    """

    def init_hf_repo(self, token=None, private=None):
        try:
            super().init_hf_repo(token=token, private=private)
        except (HfHubHTTPError, HTTPError, OSError) as error:
            raise explain(error, self.args.hub_model_id or Path(self.args.output_dir).name) from None
        if self.is_world_process_zero():
            api = hub_api(token or self.args.hub_token)
            wanted = self.args.hub_private_repo if private is None else private
            with_retries(lambda _: check_private(api, self.hub_model_id, wanted), self.hub_model_id, say=logger.warning)
            for left in Path(self.args.output_dir).glob(".pushing-*"):  # by a run that was killed
                shutil.rmtree(left, ignore_errors=True)

    def save_model(self, output_dir=None, _internal_call=False):
        super().save_model(output_dir, _internal_call=True)

    def _save_checkpoint(self, *args, **kwargs):
        """As in Trainer, without TRL's card, which would replace README.md at each checkpoint, also one by hand."""
        self.create_model_card = lambda **_: None
        try:
            return super()._save_checkpoint(*args, **kwargs)
        finally:
            del self.create_model_card

    def _save(self, output_dir=None, state_dict=None):
        """As in Trainer, but README.md stays as it is, into which PEFT writes, and an adapter gets its checksums."""
        folder = Path(output_dir or self.args.output_dir)
        card = folder / CARD
        before = card.read_bytes() if card.is_file() else None
        super()._save(output_dir, state_dict)
        if self.args.should_save and is_adapter(folder):
            card.unlink(missing_ok=True) if before is None else card.write_bytes(before)
            write_manifest(folder, ADAPTER_PATTERNS)

    def _commit(self, files, message, token=None, revision=None):
        api, revision = hub_api(token or self.args.hub_token), revision or self.args.hub_revision or "main"
        files = public_results(files)
        check_no_secret(files, token or self.args.hub_token or get_token())
        if CARD in files and self._card_by_hand(api, revision, files[CARD]):
            logger.warning("%s has a README.md that somebody wrote or edited: it stays", self.hub_model_id)
            files = {name: content for name, content in files.items() if name != CARD}
        return commit_files(
            api, self.hub_model_id, files, message, say=logger.warning, revision=revision,
            private=self.args.hub_private_repo,
        )  # fmt: skip

    def _card_by_hand(self, api, revision, card):
        card = (card if isinstance(card, bytes) else Path(card).read_bytes()).decode(errors="replace")
        look = lambda _: holds_a_card_by_hand(api, self.hub_model_id, revision, card)
        return with_retries(look, self.hub_model_id, say=logger.warning)

    def push_to_hub(
        self, commit_message="End of training", blocking=True, token=None, revision=None, private=None, **_
    ):
        """Saves the model, writes its card and pushes the run folder. Returns the CommitInfo, or its Future."""
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model()
        if not self.is_world_process_zero():
            return None
        return self._push_run_folder(commit_message, blocking, token, revision)

    def _push_run_folder(self, message, blocking=True, token=None, revision=None):
        folder = self.args.output_dir
        self._finish_current_push()
        _card(folder, self.hub_model_id)
        commit = partial(self._commit, select_files(folder, is_adapter(folder))[0], message, token, revision)
        return commit() if blocking else hub_api().run_as_future(commit)

    def push_results(self, results):
        """At the end of a run, when everything is written: pushes the run folder if wanted. Returns `results`."""
        if self.args.push_to_hub and self.is_world_process_zero():
            try:
                print(self._push_run_folder("End of training").commit_url, flush=True)
            except (ValueError, OSError) as error:
                again = f"python hub_upload.py {self.args.output_dir} {self.hub_model_id}"
                raise UploadError(f"{error}. The run is finished and saved; push it by: {again}") from error
        return results

    # -- while training goes on

    def _push_from_checkpoint(self, checkpoint_folder):
        args = self.args
        if not self.is_world_process_zero() or args.hub_strategy == HubStrategy.END:
            return
        try:
            self._start_push(Path(checkpoint_folder))
        except Exception as error:  # noqa: BLE001  of whatever kind: the checkpoint is written, training must not end
            logger.warning("%s is not pushed to the Hub (%s: %s); training goes on", checkpoint_folder,
                           type(error).__name__, error)  # fmt: skip

    def _start_push(self, checkpoint_folder):
        args = self.args
        running = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if running and not args.hub_always_push:
            return
        self.callback_handler.on_push_begin(args, self.state, self.control)
        message = f"Training in progress, step {self.state.global_step}"
        api = self._background = getattr(self, "_background", None) or hub_api(args.hub_token)  # one thread: in order
        files, links = self._snapshot(checkpoint_folder)
        jobs = [api.run_as_future(self._commit, files, message)]
        jobs[0].add_done_callback(partial(self._pushed, links, message))
        if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            last = args.hub_strategy == HubStrategy.CHECKPOINT
            jobs.append(api.upload_folder(
                repo_id=self.hub_model_id, folder_path=checkpoint_folder, commit_message=f"{message}, checkpoint",
                path_in_repo="last-checkpoint" if last else checkpoint_folder.name, run_as_future=True,
                revision=args.hub_revision,
            ))  # fmt: skip
            jobs[1].add_done_callback(partial(self._pushed, None, f"{message}, checkpoint"))
        if running:
            self.push_in_progress.jobs.extend(jobs)
        else:
            self.push_in_progress = PushInProgress(jobs)

    def _snapshot(self, checkpoint):
        """-> (files of a push, folder of links): contents as of now, which later steps and rotation may change."""
        output_dir = Path(self.args.output_dir)
        _card(output_dir, self.hub_model_id, checkpoint)
        files, _ = select_files(checkpoint, is_adapter(checkpoint))
        files |= {name: output_dir / name for name in RUN_FILES if (output_dir / name).is_file()}
        links = output_dir / f".pushing-{checkpoint.name}"
        shutil.rmtree(links, ignore_errors=True)
        links.mkdir()
        found = {}
        for name, path in files.items():
            if path.stat().st_size < SMALL_FILE:
                found[name] = path.read_bytes()
            else:
                found[name] = links / name
                try:
                    os.link(path, found[name])
                except OSError:  # a file system without links
                    shutil.copy(path, found[name])
        return found, links

    @staticmethod
    def _pushed(links, message, job):
        if links is not None:
            shutil.rmtree(links, ignore_errors=True)
        if not job.cancelled() and job.exception() is not None:
            logger.warning("push to the Hub failed (%s): %s; training goes on", message, job.exception())
