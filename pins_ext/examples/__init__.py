"""Three short scripts that run as they stand, each in seconds, on any machine and without a download.

python -m pins_ext.examples.plain_loop
python -m pins_ext.examples.trainer
accelerate launch -m pins_ext.examples.accelerate_loop
"""
