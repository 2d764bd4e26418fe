"""Where things are written, and how often."""

from typing import Literal

from pydantic import Field, model_validator

from protoclip_scale.recipe.schema.section import Positive, Section


class Profile(Section):
    """Steps to look into with torch's profiler, on every rank."""

    steps: tuple[Positive, Positive] = Field(description="First and last step to record, counted from 1 as in the log; few, since a step is megabytes.")
    memory: bool = Field(True, description="Record memory, too: on a GPU a snapshot for pytorch.org/memory_viz, on a CPU the allocations of each operator in trace and table.")

    @model_validator(mode="after")
    def _in_order(self):
        if self.steps[0] > self.steps[1]:
            raise ValueError(f"run.profile.steps {list(self.steps)}: the first comes after the last; swap them")
        return self


class Run(Section):
    """Where things are written, and how often. May change on resume."""

    dir: str = Field("runs/{name}", description="Run directory, relative to the working directory; {name} is the recipe's.")
    scratch_dir: str = Field("{dir}/scratch", description="Node-local folder for the spool and the episode's features; {dir} is the run directory.")
    seed: int = Field(0, ge=0, description="Seed of the initial weights.")
    checkpoint_steps: int = Field(0, ge=0, description="Save every n steps besides episode ends; 0 saves at episode ends only.")
    keep_checkpoints: int = Field(0, ge=0, description="Newest checkpoints kept; 0 keeps all.")
    keep_every_steps: int = Field(0, ge=0, description="Checkpoints kept for ever besides the newest: those whose step is a multiple of this; 0 keeps none besides.")
    weights: bool = Field(True, description="Write the model's whole weights into each checkpoint as weights.safetensors too (averaged ones as weights_ema.safetensors), for any safetensors reader; 4 bytes per parameter, a third more, which rank 0 writes while the others wait.")
    copy_to: str | None = Field(None, description="Folder or fsspec URL (s3://, gs://, ...) that published checkpoints are copied to in the background; where the run directory is empty the run goes on from there. {name} is the recipe's.")
    log_steps: Positive = Field(10, description="Steps between lines of the log and of metrics.jsonl.")
    export: Literal["open_clip", "transformers"] | None = Field(None, description="Layout of the export written to the run directory at the end; null writes none (launch/export.py can later).")
    report: bool = Field(True, description="Keep report.html in the run directory: recipe, curves, evaluations, prototypes, times, trouble, in one file; written beside training at checkpoints, evaluations and the end.")
    trackers: tuple[Literal["tensorboard", "wandb", "trackio", "mlflow"], ...] = Field((), description="Where the figures of metrics.jsonl are sent as well; each needs its extra (pip install 'protoclip-scale[wandb]'). A resumed run goes on under its id there. Servers and keys come from each one's own environment variables.")
    tracker_project: str = Field("protoclip-scale", pattern=r"^[A-Za-z0-9._-]+$", description="Project (W&B, Trackio) or experiment (MLflow) that the run stands in.")
    trace_rows: bool = Field(False, description="Write which row stood in which step to trace/.")
    threads: int = Field(0, ge=0, description="CPU threads per rank; 0 gives each rank its share of the cores on a machine without a GPU.")
    allow_batchnorm_microbatches: bool = Field(False, description="Let optim.microbatch cut the batch of towers with batch norm: its statistics are then those of each micro-batch over all ranks, so the step is not that of the whole batch, and running statistics move once per micro-batch.")
    timeout_minutes: float = Field(30, gt=0, description="How long a collective may wait before the run fails. Half a minute is 0.5.")
    lost_seconds: float = Field(180, gt=0, description="With several ranks: one that says nothing for so long (its machine is off, cut from the network, or frozen) while the launcher's store answers is lost, and the run ends; timeout_minutes at the latest.")
    hang_seconds: float = Field(300, gt=0, description="With several ranks: when none of them gets on for so long, the log names those that are late, which write their stacks to hangs/.")
    profile: Profile | None = Field(None, description="Write what torch's profiler records of some steps to profile/ in the run directory; null records nothing. Losses stay as they are.")
    peak_tflops: float | None = Field(None, gt=0, description="What one device can do at most at optim.precision, in TFLOP/s, for MFU in the log; null takes it from a table of GPUs, and leaves MFU out for others.")
    learning_watch_steps: int = Field(1000, ge=0, description="From this step on, contrastive losses (clip, multiview, filip) within 1% of ln(global batch) are warned about, once; 0 never.")
