"""What ``arllm bench`` measures of a bundle: latency, throughput, cold starts, memory. Importing it loads nothing."""
