"""Encode raw shards for training: pictures to VAE latents in aspect-ratio buckets, captions to text-encoder states.

    python data_pipeline/produce.py --data RAW --components FOLDER --res 256 --out OUT

Run it as often as you like, on as many machines as see OUT, at any time: each shard is made once, in order, whoever
makes it; what a process that died had begun is made by another. A trainer may be started on OUT at once: it takes
shards as they come. OUT becomes an ordinary data set (by its dataset.json) when the last shard is there.
"""

try:
    from command_line import run
    from data_pipeline.production import Production, produce
except ModuleNotFoundError as missing:
    raise SystemExit(f"not installed ({missing}): run `make setup`, or `pip install -e . -c constraints.txt`") from None

if __name__ == "__main__":
    run(produce, Production)
