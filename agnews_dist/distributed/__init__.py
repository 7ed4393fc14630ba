"""The ranks of a job: who they are, how they meet, talk, watch each other and stop together."""
