"""What several tests share: tiny models and images, launches, stand-ins for servers, faults."""
