"""What `doctor` looks at before a job: each module one kind of thing that goes wrong on clusters."""
