"""Short scripts that run as they stand, each in seconds, on any machine and without a download.

python -m pins_ext.examples.plain_loop
python -m pins_ext.examples.trainer
python -m pins_ext.examples.release_loop
python -m pins_ext.examples.frozen_base
accelerate launch -m pins_ext.examples.accelerate_loop
"""
