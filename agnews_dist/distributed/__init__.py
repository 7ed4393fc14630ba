"""The ranks of a job: launcher variables, rendezvous, collectives, heartbeats, stops and failures."""
