"""The finished output of a job, sent to the Hugging Face hub."""
